"""A trained network on the bench: with its judge and both test splits, drawn and scored."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import Checkpoint, load_checkpoint, load_model
from config import DataConfig, SamplingConfig, UserError
from dataset import SPLITS, find_data, read_conditions, read_objects
from device import pick_device
from diffusion import picture_seeds, sample
from evaluator import Evaluation, Evaluator, evaluate, require_evaluator
from model import DiffusionModel


@dataclass(frozen=True)
class Bench:
    """What testing and the sweep need: a network, its schedule, the conditions and the judge."""

    checkpoint: Checkpoint
    model: DiffusionModel
    judge: Evaluator
    labels: dict[str, Tensor]
    """Split -> (32, number of objects) multi-hot conditions."""

    @property
    def run_name(self) -> str:
        return self.checkpoint.config.run_name


def open_bench(ckpt_path: Path, data: DataConfig, device_name: str | None) -> Bench:
    """Load everything that testing needs.

    Raises:
        UserError: anything missing, damaged, or made for other objects.
    """
    device = pick_device(device_name)
    checkpoint = load_checkpoint(ckpt_path)
    paths = find_data(data)
    objects = read_objects(paths.data_dir)
    if objects != checkpoint.objects:
        raise UserError(
            f"{paths.data_dir / 'objects.json'}: other objects, or another order, than "
            f"{ckpt_path} was trained with; use its data"
        )
    judge = require_evaluator(paths, len(objects), device)
    labels = {split: read_conditions(paths.data_dir, split, objects)[1] for split in SPLITS}
    model = load_model(checkpoint, ckpt_path, device)
    print(f"judge: {judge.name}, {judge.path}")
    return Bench(checkpoint, model, judge, labels)


def draw_splits(
    bench: Bench, sampling: SamplingConfig, seed: int, progress: bool = True
) -> dict[str, tuple[Tensor, Evaluation]]:
    """Draw and score both splits in one go: split -> (pictures (32, 3, S, S), Evaluation)."""
    labels = torch.cat([bench.labels[split] for split in SPLITS])
    images, _ = sample(
        bench.model,
        bench.checkpoint.config.noise,
        labels,
        picture_seeds(seed, len(labels)),
        sampling,
        progress=progress,
    )
    parts = images.split([len(bench.labels[split]) for split in SPLITS])
    return {
        split: (part, evaluate(bench.judge, part, bench.labels[split]))
        for split, part in zip(SPLITS, parts, strict=True)
    }
