"""How a judge, or a classifier to learn from, is trained: what src/train_evaluator.py does."""

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

from iclevr.dataset import IclevrDataset, data_key, normalize
from judging.augmentation import disturb
from judging.evaluator import (
    Evaluation,
    Evaluator,
    build_evaluator,
    calibrate,
    evaluate,
    load_evaluator,
)
from judging.intervals import Interval, proportion_interval
from network.checkpoint import load_weights, read_tensors, save_tensors
from runtime.device import autocast, autocast_dtype
from runtime.output import progress_bar
from runtime.seeds import derive_seed
from runtime.settings import (
    DataConfig,
    Name,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    Settings,
    UserError,
    to_dict,
)
from runtime.signals import StopSignal
from training.pasting import CutOuts

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
    paste: Probability = 0.0
    """Share of the pictures that get an object of another one: it learns to see as well what is
    there twice, and then counts as not there. For --reward_model; the course's judge is not so."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the sequences kept out of training, for the figures."""
    init_from: Path | None = None
    """Start from the weights in this evaluator's file; a lower --lr then keeps what it knows. If
    it was trained on these pictures, the figures are too good."""
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
    labels, numbers = dataset.labels[train].to(device), torch.tensor(train)
    cut_outs = CutOuts(dataset, train) if config.paste else None
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    model = first_model(config, dataset).to(device, memory_format=torch.channels_last)
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
            x, y = images[index], labels[index]
            if cut_outs:
                pastes = torch.Generator().manual_seed(derive_seed(config.seed, 10, step))
                x, y = cut_outs.paste(x, numbers[index.cpu()], config.paste, pastes)
            x = disturb(normalize(x), generator)
            with autocast(device, dtype):
                logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits.float(), y.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            stopped = stop.agreed()
            if stopped or time.monotonic() > saved + SAVE_EACH_S:
                keep(unfinished, parts, generator, of, step, order)
                saved = time.monotonic()
            if stopped:
                break
    if step < steps:
        print(f"stopped at step {step} of {steps}; the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.number)
    model.fc[1] = sigmoid
    return model.eval().requires_grad_(False)


def first_model(config: EvaluatorConfig, dataset: IclevrDataset) -> nn.Module:
    """With PyTorch's weights, or those of --init_from."""
    model = build_evaluator(len(dataset.objects))
    if config.init_from:
        model.load_state_dict(load_evaluator(config.init_from, dataset.objects).model.state_dict())
    return model


def keep(
    path: Path, parts: dict[str, Any], generator: torch.Generator, of: dict[str, Any], step: int,
    order: Tensor,
) -> None:  # fmt: skip
    """Write what `resume` takes over."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"of": of}
    state |= {"step": step, "order": order, "generator": generator.get_state()}
    save_tensors(path, state)


def resume(
    path: Path, parts: dict[str, Any], generator: torch.Generator, of: dict[str, Any]
) -> tuple[int, Tensor]:
    """Take over what `keep` has written: the number of steps done, and the epoch's order.

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
) -> tuple[Evaluator, Evaluation]:
    """Set the threshold on one half of the held-out pictures, judge the other half.

    Returns:
        the judge with its threshold, and what it finds in the second half.
    """
    first, second = split_by_sequence([dataset.names[i] for i in held_out], 0.5)
    calibration, tested = (np.array(held_out)[half] for half in (first or second, second))
    scores = judge.scores(normalize(torch.from_numpy(dataset.images[calibration])))
    judge = replace(judge, threshold=calibrate(scores, dataset.labels[calibration]))
    images = normalize(torch.from_numpy(dataset.images[tested]))
    return judge, evaluate(judge, images, dataset.labels[tested])


def judge_pasted(
    judge: Evaluator, dataset: IclevrDataset, held_out: list[int], cut_outs: CutOuts, seed: int
) -> dict[str, Interval]:
    """Exact sets in held-out pictures with one more object: a new one, and one that is there.

    Where no object could be pasted so, that figure is left out.
    """
    _, tested = split_by_sequence([dataset.names[i] for i in held_out], 0.5)
    numbers = np.array(held_out)[tested]
    images, labels = cut_outs.paste(
        torch.from_numpy(dataset.images[numbers]), torch.from_numpy(numbers), 1.0,
        torch.Generator().manual_seed(seed),
    )  # fmt: skip
    found = evaluate(judge, normalize(images), labels)
    change = (labels - dataset.labels[numbers]).sum(dim=1)
    kinds = {"pasted_new_exact_sets": change > 0, "pasted_twice_exact_sets": change < 0}
    return {name: shares(found, which)[1] for name, which in kinds.items() if which.any()}


def shares(found: Evaluation, which: Tensor) -> tuple[Interval, Interval]:
    """Accuracy and exact sets over some of the pictures: `which`, (N,) bool."""
    correct, total, exact = (x[which] for x in (found.correct, found.total, found.exact))
    return (
        proportion_interval(int(correct.sum()), int(total.sum())),
        proportion_interval(int(exact.sum()), len(exact)),
    )
