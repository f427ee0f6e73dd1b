"""Train the judge: a ResNet18 like the course's, on the pictures of train.json.

    python src/train_evaluator.py

Writes evaluator.pth beside the data, in the course's format (key "model"), with the threshold
from which an object counts as detected, and its figures on held-out sequences: half of these set
the threshold, the other half give the figures. It is trained on pictures that were disturbed, so
that it judges objects, not pixels.

Stopped (Ctrl-C, a scheduler's signal) or killed, it goes on by the same command, from
evaluator.unfinished.pth beside that file, written every ten minutes and when stopped.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from iclevr.dataset import IclevrDataset, find_data, normalize
from judging.disturb import disturb
from judging.evaluator import IMAGE_SIZE, Evaluator, build_evaluator, calibrate, evaluate
from judging.intervals import Interval, proportion_interval
from network.checkpoint import load_weights, read_tensors, save_tensors
from runtime.device import autocast, autocast_dtype, pick_device, warn_of_launcher
from runtime.files import make_folder
from runtime.output import progress_bar
from runtime.settings import (
    DataConfig,
    Name,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    UserError,
    parse_args,
    run,
    to_dict,
)
from runtime.signals import StopSignal
from training.trainer import data_key

SAVE_EACH_S = 600
"""Time between savings of an unfinished training."""


@dataclass(frozen=True)
class EvaluatorConfig(Settings):
    """Train the ResNet18 that judges pictures."""

    epochs: PositiveInt = 20
    """Passes over the training pictures."""
    batch_size: PositiveInt = 64
    """Pictures of one step."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of AdamW (one cycle)."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's decoupled weight decay."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the sequences kept out of training, for the figures."""
    name: Name | None = None
    """What the judge is called in outputs (default: after its pictures)."""
    out: Path | None = None
    """File to write (default: evaluator.pth in the data folder)."""
    overwrite: bool = False
    """Replace an existing file."""
    seed: Seed = 0
    """Seed of weights, order and disturbances."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 where the device computes faster in it, else no."""
    data: DataConfig = field(default_factory=DataConfig)


def split_by_sequence(names: list[str], held_out: float) -> tuple[list[int], list[int]]:
    """Indices of training and held-out pictures; a sequence's pictures stay together.

    `CLEVR_train_000017_2.png` belongs to sequence `CLEVR_train_000017`; the last sequences by
    name are held out.
    """
    sequences = sorted({name.rsplit("_", 1)[0] for name in names})
    kept = set(sequences[: len(sequences) - max(1, round(held_out * len(sequences)))])
    train = [i for i, name in enumerate(names) if name.rsplit("_", 1)[0] in kept]
    return train, sorted(set(range(len(names))) - set(train))


def fit(
    config: EvaluatorConfig,
    dataset: IclevrDataset,
    train: list[int],
    device: torch.device,
    unfinished: Path,
) -> nn.Module:
    """A ResNet18 trained on the pictures `train` of the data set.

    Interrupted, by a signal or otherwise, it goes on to the same weights from the file
    `unfinished`, see `resume`.
    """
    images = torch.from_numpy(dataset.images[train]).to(device)  # (N, 3, 64, 64) uint8
    labels = dataset.labels[train].to(device)
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    model = build_evaluator(labels.shape[1]).to(device, memory_format=torch.channels_last)
    sigmoid, model.fc[1] = model.fc[1], nn.Identity()  # the loss takes logits
    batch_size = min(config.batch_size, len(train))
    epoch_steps = len(train) // batch_size
    steps = config.epochs * epoch_steps
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, pct_start=0.15)
    dtype = autocast_dtype(config.mixed_precision, device)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    of = {"pictures": data_key(dataset), "settings": to_dict(config)}
    step, order = resume(unfinished, parts, generator, of) if unfinished.exists() else (0, None)
    saved = time.monotonic()
    bar = progress_bar(total=steps, initial=step, desc="train evaluator", unit="step")
    with StopSignal() as stop, bar:
        while step < steps:
            start = step % epoch_steps * batch_size
            if start == 0:
                order = torch.randperm(len(train), generator=generator, device=device)
            index = order[start : start + batch_size]
            x = disturb(normalize(images[index]), generator)
            with autocast(device, dtype):
                logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if stop.agreed() or time.monotonic() > saved + SAVE_EACH_S:
                state = {name: part.state_dict() for name, part in parts.items()} | {"of": of}
                state |= {"step": step, "order": order, "generator": generator.get_state()}
                save_tensors(unfinished, state)
                saved = time.monotonic()
            if stop.agreed():
                break
    if step < steps:
        print(f"stopped at step {step} of {steps}; the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.number)
    model.fc[1] = sigmoid
    return model.eval().requires_grad_(False)


def resume(
    path: Path, parts: dict[str, Any], generator: torch.Generator, of: dict[str, Any]
) -> tuple[int, Tensor]:
    """Take over what `fit` has saved: the number of steps done, and the epoch's order.

    Raises:
        UserError: the file is damaged, or of other pictures or settings.
    """
    remedy = f"finish it with its settings, name another --out, or delete {path.name}"
    content = read_tensors(path, remedy)
    if content.get("of") != of:
        raise UserError(f"{path}: an unfinished training with other settings or pictures; {remedy}")
    load_weights(parts["model"], content["model"], path, "a ResNet18")
    for name in ("optimizer", "schedule"):
        parts[name].load_state_dict(content[name])
    generator.set_state(content["generator"])
    print(f"goes on from step {content['step']}, {path}")
    return content["step"], content["order"].to(generator.device)


def calibrate_and_test(
    judge: Evaluator, dataset: IclevrDataset, held_out: list[int]
) -> tuple[Evaluator, Interval, Interval, int]:
    """Set the threshold on one half of the held-out pictures, take the figures from the other.

    Returns:
        the judge with its threshold, accuracy, exact sets, and of how many pictures these are.
    """
    first, second = split_by_sequence([dataset.names[i] for i in held_out], 0.5)
    calibration, tested = (np.array(held_out)[half] for half in (first or second, second))
    scores = judge.scores(normalize(torch.from_numpy(dataset.images[calibration])))
    judge = replace(judge, threshold=calibrate(scores, dataset.labels[calibration]))
    images = normalize(torch.from_numpy(dataset.images[tested]))
    result = evaluate(judge, images, dataset.labels[tested])
    accuracy = proportion_interval(int(result.correct.sum()), int(result.total.sum()))
    exact = proportion_interval(int(result.exact.sum()), len(tested))
    return judge, accuracy, exact, len(tested)


def main(argv: list[str] | None = None) -> dict:
    """Train the judge; returns what its file says of it."""
    config = parse_args(EvaluatorConfig, argv)
    paths = find_data(config.data)
    out = config.out or paths.data_dir / "evaluator.pth"
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file with --out")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out}: is there already; --overwrite replaces it, --out names another")
    rendered = (paths.data_dir / "render.json").exists()
    name = config.name or ("stand-in" if rendered else f"trained on {paths.data_dir.name}")
    if config.name is None and config.seed:
        name += f", seed {config.seed}"
    device = pick_device(config.device)
    warn_of_launcher(config.mixed_precision)
    dataset = IclevrDataset(
        paths.data_dir, paths.image_dir, "train", IMAGE_SIZE, paths.cache_dir, paths.follow_links
    )
    train, held_out = split_by_sequence(dataset.names, config.held_out)
    if not train:
        raise UserError(
            f"--held_out {config.held_out:g}: leaves no sequence of "
            f"{paths.data_dir / 'train.json'} to train on"
        )
    make_folder(out.parent, "--out")

    unfinished = out.with_name(f"{out.stem}.unfinished.pth")
    alike = replace(config, name=None, out=None, overwrite=False, data=DataConfig())
    model = fit(alike, dataset, train, device, unfinished)
    # Half precision halves the file; the figures below are those of the rounded weights.
    weights = {
        key: value.cpu().half() if value.ndim > 1 else value.cpu()
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    judge = Evaluator(model, name, out, dataset.objects)
    judge, accuracy, exact, tested = calibrate_and_test(judge, dataset, held_out)
    settings = ("epochs", "batch_size", "lr", "weight_decay", "held_out", "seed")
    info = {
        "train_pictures": len(train),
        "held_out_pictures": tested,
        "held_out_accuracy": vars(accuracy),
        "held_out_exact_sets": vars(exact),
        "settings": {key: getattr(config, key) for key in settings},
    }
    content = {"model": weights, "name": name, "objects": dataset.objects}
    save_tensors(out, content | {"threshold": judge.threshold, "info": info})
    unfinished.unlink(missing_ok=True)
    print(
        f"{out}: judge {name}, threshold {judge.threshold:.3f}\n"
        f"on {tested} held-out pictures: accuracy {accuracy}, exact sets {exact}"
    )
    return info


if __name__ == "__main__":
    run(main)
