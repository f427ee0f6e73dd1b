"""Training steps: this repository's network against diffusers' `UNet2DModel`.

    python benchmarks/training_step.py                                # a small network, for a CPU
    python benchmarks/training_step.py --recipe original --compile    # the full-size one, for a GPU

Both run src/train.py's own step with the same weights, pictures, random numbers, layout, fused
AdamW and weight average, in float32 and in bfloat16 autocast. One more row is diffusers as its
example scripts run it: float32, contiguous, AdamW not fused, a plain loop. Prints tables, writes
output/benchmarks/training_step.json.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from common import describe, interleave, machine, ratios, show, spread, synchronize, table

from diffusion.loss import draw_timesteps, drop_labels, training_loss
from diffusion.samplers import make_scheduler
from network.model import DiffusionModel, stages, unet_arguments
from runtime.device import autocast_dtype, pick_device
from runtime.files import write_json
from runtime.settings import (
    ROOT,
    ModelConfig,
    PositiveInt,
    RecipeName,
    Settings,
    TrainConfig,
    UserError,
    parse_args,
    run,
    to_dict,
)
from training.recipes import RECIPES
from training.step import TrainState, build_state, step_generator, train_step, update_ema

WARM_UP = 3
"""Steps before anything is measured; the first one compiles."""
SCHEDULED = 10**6
"""Steps of the learning rate's schedule, of which the measurement is a short part."""
EXAMPLE = "diffusers, as in its examples"
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class StepConfig(Settings):
    """Measure training steps of this repository's network and of diffusers'."""

    recipe: RecipeName = "small"
    """Network and batch size, unless given by their own flags."""
    batch_size: PositiveInt = RECIPES["small"].batch_size
    """Pictures of one optimiser step."""
    rounds: PositiveInt = 5
    """Every variant is measured once a round."""
    steps: PositiveInt = 10
    """Optimiser steps of one measurement."""
    compile: bool = False
    """Measure all variants with torch.compile too; its time is stated as warm-up."""
    device: str | None = None
    """cuda, cuda:1, mps, cpu ... (default: the best there is)."""
    out: Path = ROOT / "output" / "benchmarks" / "training_step.json"
    """Where the figures go."""
    model: ModelConfig = RECIPES["small"].model


class DiffusersModel(nn.Module):
    """diffusers' `UNet2DModel` in the place of ours; parameters have the names of ours."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.unet = diffusers.UNet2DModel(**unet_arguments(config))
        self.class_embedding = DiffusionModel(config).class_embedding
        self.patch_size = config.patch_size

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, features: None = None) -> Tensor:
        patches = F.pixel_unshuffle(x_t, self.patch_size)
        prediction = self.unet(patches, t, self.class_embedding(labels)).sample
        return F.pixel_shuffle(prediction, self.patch_size)


class Variant:
    """A network in training, always on the same batch; calling it gives pictures/s.

    Args:
        config: network, batch size, optimiser and number format.
        steps: optimiser steps of one call.
        kind: the class of the network.
        weights: what it starts from; None: what the seed gives.
        layout: of the network and its pictures in memory.
        example: contiguous, plain AdamW and `example_step`, else what src/train.py uses.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        steps: int,
        kind: type[nn.Module] = DiffusionModel,
        weights: dict[str, Tensor] | None = None,
        compiled: bool = False,
        layout: torch.memory_format = torch.channels_last,
        example: bool = False,
    ):
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.config, self.device, self.steps, self.example = config, device, steps, example
        self.dtype = autocast_dtype(config.mixed_precision, device)
        self.scheduler = make_scheduler(config.noise)
        with mock.patch("training.step.DiffusionModel", kind):  # all but the network is the same
            self.state = build_state(config, SCHEDULED, device)
        layout = torch.contiguous_format if example else layout
        for model in (self.state.model, self.state.ema):
            if weights is not None:
                model.load_state_dict(weights)
            model.to(memory_format=layout)
        if example:
            adamw = torch.optim.AdamW(self.state.model.parameters(), config.lr)
            rates = get_cosine_schedule_with_warmup(adamw, config.lr_warmup_steps, SCHEDULED)
            self.state = replace(self.state, optimizer=adamw, lr_scheduler=rates)
        if compiled:
            self.state.model.compile()

        size, generator = config.model.image_size, torch.Generator().manual_seed(0)
        x_0 = torch.rand(config.batch_size, 3, size, size, generator=generator) * 2 - 1
        labels = torch.rand(config.batch_size, config.model.num_classes, generator=generator) < 0.1
        self.x_0, self.labels = x_0.to(device, memory_format=layout), labels.float().to(device)

        since = time.perf_counter()
        self.first_loss = self.step()
        for _ in range(WARM_UP - 1):
            self.step()
        synchronize(device)
        self.warm_up = time.perf_counter() - since
        self.peak = None  # bytes; of a CPU's process it can't be told for each variant
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.step()
            self.peak = torch.cuda.max_memory_allocated(device) - before

    def step(self) -> Tensor:
        step = example_step if self.example else train_step
        arguments = (self.config, self.scheduler, self.x_0, self.labels, self.dtype)
        return step(self.state, *arguments)[0]

    def __call__(self) -> float:
        synchronize(self.device)
        since = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        synchronize(self.device)
        return self.steps * len(self.x_0) / (time.perf_counter() - since)


def example_step(
    state: TrainState,
    config: TrainConfig,
    scheduler: diffusers.DDPMScheduler,
    x_0: Tensor,
    labels: Tensor,
    dtype: None,
) -> tuple[Tensor, Tensor]:
    """What the loop of diffusers' train_unconditional.py does, with our loss; float32 alone."""
    generator = step_generator(config.seed, state.step, x_0.device)
    t = draw_timesteps(len(x_0), config.noise.num_train_timesteps, generator=generator)
    eps = torch.randn(x_0.shape, device=x_0.device, generator=generator)
    kept = drop_labels(labels, config.cfg_dropout_prob, generator)
    loss = training_loss(state.model, scheduler, x_0, kept, t, eps).mean()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
    state.optimizer.step()
    state.lr_scheduler.step()
    state.optimizer.zero_grad()
    update_ema(state.ema, state.model, config.ema_decay)
    state.step += 1
    return loss.detach(), grad_norm


class Matmul:
    """The machine's own rate in one number format: calling it multiplies; FLOP/s."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        side = 8192
        if device.type == "cpu":
            side = 512 if self.is_emulated(dtype) else 2048
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self()

    @staticmethod
    def is_emulated(dtype: torch.dtype) -> bool:
        """Whether this CPU has no instructions for it: then it is a hundred times as slow."""
        small = torch.randn(256, 256).to(dtype)
        small @ small
        since = time.perf_counter()
        small @ small
        return time.perf_counter() - since > 0.01

    def __call__(self, repeats: int = 5) -> float:
        # On CUDA, cuDNN's float32 convolutions use TF32 by default: compare with the same.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        synchronize(self.a.device)
        since = time.perf_counter()
        for _ in range(repeats):
            self.a @ self.b
        synchronize(self.a.device)
        seconds = time.perf_counter() - since
        torch.set_float32_matmul_precision(before)
        return repeats * 2 * len(self.a) ** 3 / seconds


def build_variants(config: StepConfig, device: torch.device) -> dict[str, Variant]:
    """All variants, warmed up one after the other."""
    torch.manual_seed(0)
    weights = DiffusionModel(config.model).state_dict()
    settings = TrainConfig(batch_size=config.batch_size, model=config.model)
    variants = {}

    def add(name: str, precision: str, *options: Any, **more: Any) -> None:
        print(f"warm-up: {name}", flush=True)
        config_of = replace(settings, mixed_precision=precision)
        variants[name] = Variant(config_of, device, config.steps, *options, **more)

    for compiled in (False, True) if config.compile else (False,):
        for precision, dtype in PRECISIONS.items():
            for name, kind in (("ours", DiffusionModel), ("diffusers", DiffusersModel)):
                name = f"{name}, {dtype}{', compiled' * compiled}"
                add(name, precision, kind, weights, compiled)
    add(EXAMPLE, "no", DiffusersModel, weights, example=True)
    losses = torch.stack([variant.first_loss for variant in variants.values()])
    same = (losses / losses[0] - 1).abs().max() < 0.01
    assert same or config.model.dropout, f"not the same network: {losses}"
    return variants


def pairs(config: StepConfig, device: torch.device) -> dict[str, tuple[str, str]]:
    """What is compared with what: a label, and the names of two variants."""
    found = {}
    for more in ("", ", compiled") if config.compile else ("",):
        for dtype in PRECISIONS.values():
            ours = f"ours, {dtype}{more}"
            found[f"ours / diffusers, {dtype}{more}"] = (ours, f"diffusers, {dtype}{more}")
            if more:
                found[f"ours compiled / not, {dtype}"] = (ours, f"ours, {dtype}")
    bf16 = autocast_dtype(TrainConfig.mixed_precision, device) == torch.bfloat16
    defaults = f"ours, {PRECISIONS['bf16' if bf16 else 'no']}"
    found[f"src/train.py's defaults ({defaults}) / {EXAMPLE}"] = (defaults, EXAMPLE)
    return found


def flops_a_picture(config: ModelConfig) -> float:
    """Of a training step: its backward pass costs twice the forward pass."""
    return 3 * stages(config)[2]


def row_of(variant: Variant, rates: Sequence[float], matmul_rate: float) -> dict[str, Any]:
    """A variant's figures, JSON-able; `rates` in pictures/s, `matmul_rate` in FLOP/s."""
    flops = flops_a_picture(variant.config.model)
    return {
        "pictures_per_s": spread(rates),
        "share_of_matmul": spread([rate * flops / matmul_rate for rate in rates]),
        "peak_memory_bytes": variant.peak,
        "warm_up_s": variant.warm_up,
    }


def step_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of what `row_of` has found."""
    shares = {n: [100 * x for x in row["share_of_matmul"]["rounds"]] for n, row in rows.items()}
    peaks = {name: row["peak_memory_bytes"] for name, row in rows.items()}
    columns = {
        "pictures/s": {n: show(row["pictures_per_s"]["rounds"]) for n, row in rows.items()},
        "share of matmul rate": {n: show(share, "%") for n, share in shares.items()},
        "peak memory": {n: f"{p / 2**20:,.0f} MiB" if p else "-" for n, p in peaks.items()},
        f"warm-up, {WARM_UP} steps": {n: f"{r['warm_up_s']:.1f} s" for n, r in rows.items()},
    }
    return table("training step", columns)


def main(argv: Sequence[str] | None = None) -> None:
    recipe = RECIPES[parse_args(StepConfig, argv).recipe]
    default = StepConfig(model=recipe.model, batch_size=recipe.batch_size)
    config = parse_args(StepConfig, argv, default)
    if config.model.halve_every_block:
        raise UserError("--halve_every_block: diffusers' network has no such thing; leave it out")
    device = pick_device(config.device)
    matmuls = {  # first: what cuBLAS allocates is no variant's memory
        f"matmul, {dtype}": Matmul(device, getattr(torch, dtype)) for dtype in PRECISIONS.values()
    }
    variants = build_variants(config, device)
    rates = interleave({**variants, **matmuls}, config.rounds)
    # By the median: one multiplication that the system interrupts would spoil its whole round.
    peaks = {name: statistics.median(rates[name]) for name in matmuls}
    rows = {
        name: row_of(variant, rates[name], peaks[f"matmul, {_dtype(variant)}"])
        for name, variant in variants.items()
    }
    compared = {name: ratios(rates[a], rates[b]) for name, (a, b) in pairs(config, device).items()}
    flops = flops_a_picture(config.model)
    where = machine(device) | {"diffusers": diffusers.__version__}
    report = {
        "machine": where,
        "settings": to_dict(config),
        "training_flops_per_picture": flops,
        "variants": rows,
        "matmul_flops_per_s": {name: spread(rates[name]) for name in matmuls},
        "ratios": {label: spread(values) for label, values in compared.items()},
    }
    write_json(config.out, report)
    print(f"\n{describe(where)}")
    print(
        f"batch {config.batch_size}, {flops / 1e9:.2f} GFLOP a picture and training step; "
        f"median [range] of {config.rounds} rounds of {config.steps} steps\n"
    )
    print(step_table(rows))
    if device.type != "cuda":
        print("\nPeak memory is measured on CUDA only: a CPU's process has one peak for all.")
    cells = {label: show(values) for label, values in compared.items()}
    print(f"\n{table('pictures/s, round by round', {'ratio': cells})}")
    cells = {name: show([rate / 1e12 for rate in rates[name]]) for name in matmuls}
    print(f"\n{table('the machine itself', {'TFLOP/s': cells})}\n\n{config.out}")


def _dtype(variant: Variant) -> str:
    return PRECISIONS["no" if variant.dtype is None else "bf16"]


if __name__ == "__main__":
    run(main)
