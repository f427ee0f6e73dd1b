"""A trained network on the bench: with its judge and both test splits, drawn and scored."""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.sampling import sample
from iclevr.dataset import SPLITS, DataPaths, find_data, read_conditions, read_objects
from judging.evaluator import (
    Evaluation,
    Evaluator,
    evaluate,
    git_blob_hash,
    load_evaluator,
    require_evaluator,
)
from judging.metrics import Record
from judging.realism import Reference, draw_conditions, frechet_distance, load_reference
from network.checkpoint import PRETRAINED, Checkpoint, load_checkpoint, load_model
from network.model import DiffusionModel
from runtime import processes
from runtime.device import autocast_dtype, pick_device
from runtime.seeds import picture_seeds
from runtime.settings import (
    ROOT,
    DataConfig,
    FdSamples,
    SamplingConfig,
    Seed,
    Settings,
    UserError,
    WandbMode,
    to_dict,
)


@dataclass(frozen=True)
class BenchConfig(Settings):
    """What src/test.py and src/guidance_scale.py have in common."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py (default: the pretrained network, see data/README.md)."""
    seed: Seed = 0
    """Seed of the first draw; the others follow."""
    num_fd_samples: FdSamples | None = None
    """Pictures drawn for each draw's Frechet distance to the training pictures, 0: none
    (default: 2048, on a CPU none, which would take it an hour)."""
    judge: Path | None = None
    """A second evaluator, which scores instead of --evaluator; test.py reports both."""
    output_dir: Path = ROOT / "output" / "result"
    """Results go to a folder in here, named after the run."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    wandb: WandbMode = "auto"
    """auto: online when logged in to Weights & Biases, else offline."""
    wandb_project: str = "iclevr-ddpm"
    """Project name at Weights & Biases."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Bench:
    """What testing and the sweep need: a network, its schedule, the conditions and the judge."""

    checkpoint: Checkpoint
    blob: str
    """git's hash of the checkpoint."""
    model: DiffusionModel
    judge: Evaluator
    """Scores: the one of --judge, else of --evaluator."""
    guide: Evaluator
    """The one of --evaluator, whose gradient is followed when asked for."""
    labels: dict[str, Tensor]
    """Split -> (32, number of objects) multi-hot conditions."""
    paths: DataPaths
    reference: Reference | None
    """The training pictures; None where they are not asked for or not there."""

    @property
    def run_name(self) -> str:
        return self.checkpoint.config.run_name

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def judge_name(self, sampling: SamplingConfig) -> str:
        """The judge, and whether the pictures were drawn with its help."""
        if not sampling.classifier_guidance_scale:
            return self.judge.name
        if self.judge is self.guide:
            return f"{self.judge.name}, guided by the judge"
        return f"{self.judge.name}, guided by the judge {self.guide.name}"


def open_bench(
    ckpt_path: Path, data: DataConfig, device_name: str | None, judge_path: Path | None = None
) -> Bench:
    """Load what testing needs, but for the training pictures: see `with_reference`.

    Args:
        judge_path: a second evaluator, which scores instead of the data's.

    Raises:
        UserError: anything missing, damaged, or made for other objects.
    """
    device = pick_device(device_name)
    checkpoint, blob = load_checkpoint(ckpt_path), git_blob_hash(ckpt_path)
    paths = find_data(data)
    objects = read_objects(paths.data_dir)
    if objects != checkpoint.objects:
        raise UserError(
            f"{paths.data_dir / 'objects.json'}: other objects, or another order, than "
            f"{ckpt_path} was trained with; use its data"
        )
    guide = require_evaluator(paths, objects, device)
    judge = load_evaluator(judge_path, objects, device) if judge_path else guide
    labels = {split: read_conditions(paths.data_dir, split, objects)[1] for split in SPLITS}
    model = load_model(checkpoint, ckpt_path, device)
    pretrained = ckpt_path.resolve() == PRETRAINED.resolve()
    origin = "pretrained on the stand-in; " if pretrained else ""
    print(f"network: {origin}{checkpoint.config.run_name}, step {checkpoint.step}, {ckpt_path}")
    print(f"judge: {judge.name}, threshold {judge.threshold:.2f}, {judge.path}")
    return Bench(checkpoint, blob, model, judge, guide, labels, paths, reference=None)


def with_reference(bench: Bench) -> Bench:
    """The same with the training pictures, decoding them if need be; without them, says so."""
    if not (bench.paths.data_dir / "train.json").exists():
        print("no nearest.png: no training pictures here; python src/render_iclevr.py renders some")
        return bench
    try:
        return replace(bench, reference=load_reference(bench.paths, bench.judge))
    except UserError as error:  # scoring the conditions needs no training pictures
        print(f"no Frechet distance, no nearest pictures: {error}", file=sys.stderr)
        return bench


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
        guide=bench.guide,
    )
    parts = images.split([len(bench.labels[split]) for split in SPLITS])
    return {
        split: (part, evaluate(bench.judge, part, bench.labels[split]))
        for split, part in zip(SPLITS, parts, strict=True)
    }


def draw_frechet(
    bench: Bench, sampling: SamplingConfig, seed: int, count: int, progress: bool = True
) -> float:
    """Frechet distance of `count` pictures, their conditions drawn from the training pictures'.

    Every way of sampling gets the same conditions and noise for a seed. Only the first process
    computes it, the others get NaN.
    """
    images, _ = sample(
        bench.model,
        bench.checkpoint.config.noise,
        draw_conditions(bench.reference, count, seed),
        picture_seeds(seed, count, purpose=2),
        sampling,
        progress=progress,
        guide=bench.guide,
    )
    if not processes.is_main():
        return math.nan
    return frechet_distance(bench.reference.features, bench.judge.features(images))


def fd_samples(config: BenchConfig, bench: Bench) -> int:
    """Pictures for each Frechet distance: those asked for, or the default, which it says."""
    if config.num_fd_samples is not None:
        return config.num_fd_samples
    if bench.device.type != "cpu":
        return 2048
    print("no Frechet distance: on a CPU only with --num_fd_samples, such as 512")
    return 0


def settings_key(num_fd_samples: int, bench: Bench, sampling: SamplingConfig) -> str:
    """Hash of all that a draw depends on but its seed: draws of other settings are never mixed in.

    It names the folder of the results.
    """
    parts = {
        "checkpoint": bench.blob,
        "judge": bench.judge.blob,
        "guide": bench.guide.blob if bench.guide is not bench.judge else None,
        "fd": num_fd_samples if bench.reference else 0,
        "training": bench.reference and bench.reference.key,
        "labels": {split: labels.tolist() for split, labels in bench.labels.items()},
        "sampling": to_dict(replace(sampling, batch_size=1)),
        "arithmetic": f"{bench.device.type} "
        f"{autocast_dtype(sampling.mixed_precision, bench.device)}",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


@dataclass
class Draw:
    """One draw of both splits: a record for each, and the Frechet distance if asked for."""

    records: dict[str, Record]
    frechet: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """What a script keeps beside, JSON-able."""


Draws = dict[tuple[float, int], Draw]
"""(guidance scale, seed) -> draw."""


def read_draws(path: Path) -> Draws:
    """Draws made before; a line cut short by a kill is left out, and drawn again."""
    draws = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(line)
                draw = Draw(line["records"], line["frechet"], line.get("more", {}))
                draws[line["scale"], line["seed"]] = draw
            except (ValueError, TypeError, KeyError):
                continue
    return draws


def append_draw(path: Path, scale: float, seed: int, draw: Draw) -> None:
    """Add one line; the leading newline ends a line that a kill has cut short."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"scale": scale, "seed": seed} | vars(draw)))
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
