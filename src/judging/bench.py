"""A trained network on the bench: with its judge and both test splits, drawn and scored."""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from diffusion import doubts
from diffusion.samplers import check_steps
from diffusion.sampling import relay, sample, sample_steps
from diffusion.schedule import unscale
from iclevr.dataset import DataPaths, find_data
from iclevr.labels import condition_files, read_conditions, read_objects
from judging.evaluator import Evaluation, Evaluator, evaluate, git_blob_hash, load_evaluator
from judging.metrics import SHARES, Record, record
from judging.realism import Reference, draw_conditions, frechet_distance, load_reference
from network.checkpoint import PRETRAINED, Checkpoint, load_checkpoint, load_model
from network.model import DiffusionModel
from runtime import processes
from runtime.device import autocast_dtype, pick_device, warn_of_launcher
from runtime.files import append, check_folder, read_lines
from runtime.output import progress_bar
from runtime.seeds import picture_seeds
from runtime.settings import (
    ROOT,
    DataConfig,
    FdSamples,
    SamplerConfig,
    SamplingConfig,
    Seed,
    Settings,
    UserError,
    WandbMode,
    to_dict,
)

Config = TypeVar("Config", bound="BenchConfig")


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
    conditions: Annotated[tuple[Path, ...], Field(min_length=1)] | None = None
    """Draw the conditions of these files, lists of lists of object names like test.json, in place
    of test.json and new_test.json."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True)
class Bench:
    """What testing and the sweep need: a network, its schedule, the conditions and the judge."""

    checkpoint: Checkpoint
    blob: str
    """git's hash of the checkpoint."""
    model: DiffusionModel
    judge: Evaluator | None
    """Scores: the one of --judge, else of --evaluator; None only where it is not needed."""
    guide: Evaluator | None
    """The one of --evaluator, whose gradient is followed when asked for."""
    labels: dict[str, Tensor]
    """Split -> (N, number of objects) multi-hot conditions: the course's two of 32, or the files of
    --conditions."""
    paths: DataPaths
    reference: Reference | None
    """The training pictures; None where they are not asked for or not there."""

    @property
    def run_name(self) -> str:
        return self.checkpoint.config.run_name

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def judge_name(self, sampling: SamplerConfig, judge: Evaluator | None = None) -> str:
        """The judge, or another one of the bench, and whether pictures were drawn with its help."""
        judge = judge or self.judge
        if not sampling.classifier_guidance_scale:
            return judge.name
        other = "" if judge is self.guide else f" {self.guide.name}"
        return f"{judge.name}, guided by the judge{other}"

    def sample(
        self, labels: Tensor, seeds: Sequence[int], sampling: SamplingConfig, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """As `diffusion.sampling.sample`, with this network, schedule and guide."""
        noise = self.checkpoint.config.noise
        return sample(self.model, noise, labels, seeds, sampling, guide=self.guide, **more)

    def watch(
        self, labels: Tensor, seeds: Sequence[int], sampling: SamplingConfig
    ) -> Generator[Tensor, None, Tensor]:
        """As `sample`: yields noise and what each step makes of it, returns the pictures.

        All are (N, 3, S, S) in [-1, 1] on the CPU.
        """
        noise = self.checkpoint.config.noise
        steps = sample_steps(
            self.model, noise, labels, seeds, sampling, progress=False, guide=self.guide
        )
        images, _ = yield from relay(steps, lambda x_t: unscale(x_t, noise).clamp(-1, 1).cpu())
        return images

    def arithmetic(self, sampling: SamplerConfig) -> str:
        """Device and number format: another one rounds differently."""
        dtype = autocast_dtype(sampling.mixed_precision, self.device)
        return f"{self.device.type} {dtype}"


def open_bench(
    ckpt_path: Path,
    data: DataConfig,
    device_name: str | None,
    judge_path: Path | None = None,
    needs_judge: bool = True,
    conditions: Sequence[Path] | None = None,
) -> Bench:
    """Load what testing needs, but for the training pictures: see `with_reference`.

    Args:
        judge_path: a second evaluator, which scores instead of the data's.
        needs_judge: it is an error if there is no evaluator at all.
        conditions: files to draw in place of test.json and new_test.json.

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
    guide = None
    if paths.evaluator or needs_judge:
        guide = load_evaluator(paths.evaluator, objects, device)
    judge = load_evaluator(judge_path, objects, device) if judge_path else guide
    files = condition_files(paths.data_dir, conditions)
    labels = {split: read_conditions(path, objects)[1] for split, path in files.items()}
    model = load_model(checkpoint, ckpt_path, device)
    pretrained = ckpt_path.resolve() == PRETRAINED.resolve()
    origin = "pretrained on the stand-in; " if pretrained else ""
    print(f"network: {origin}{checkpoint.config.run_name}, step {checkpoint.step}, {ckpt_path}")
    of_judge = f"{judge.name}, threshold {judge.threshold:.2f}, {judge.path}" if judge else "none"
    print(f"judge: {of_judge}")
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


def settle(
    config: Config, bench: Bench, scales: Sequence[float], nearest: bool = False
) -> tuple[Config, Bench]:
    """What a script's settings leave open, and the training pictures where they are needed.

    Args:
        scales: guidance scales that pictures are drawn with.
        nearest: they are needed anyway, not only for a Frechet distance.

    Returns:
        the settings with the number of steps, and of pictures for each Frechet distance (0 where
        none can be computed), and the bench.

    Raises:
        UserError: the network was not trained for so many steps, or the folder of the results
            can't be written to.
    """
    trained = bench.checkpoint.config
    steps = check_steps(trained.noise, config.sampling)
    warn_of_launcher(config.sampling.mixed_precision)
    doubts.warn(doubts.of_sampling(config.sampling, scales))
    doubts.warn(doubts.of_guidance(trained, "guidance", scales))
    check_folder(config.output_dir / bench.run_name)
    count = config.num_fd_samples
    if count is None:
        count = 0 if bench.device.type == "cpu" else 2048
        if not count:
            print("no Frechet distance: on a CPU only with --num_fd_samples, such as 512")
    if count or nearest:
        bench = with_reference(bench)
    if config.num_fd_samples and bench.reference is None:
        raise UserError(
            f"--num_fd_samples {config.num_fd_samples}: a Frechet distance needs training "
            "pictures, which are not there; use 0, or name them with --data_dir"
        )
    sampling = replace(config.sampling, num_inference_steps=steps)
    count = count if bench.reference else 0
    return replace(config, sampling=sampling, num_fd_samples=count), bench


def draw_splits(
    bench: Bench, sampling: SamplingConfig, seed: int, progress: bool = True
) -> dict[str, tuple[Tensor, Evaluation]]:
    """Draw and score all splits in one go: split -> (pictures (N, 3, S, S), Evaluation)."""
    labels = torch.cat([*bench.labels.values()])
    seeds = picture_seeds(seed, len(labels))
    images, _ = bench.sample(labels, seeds, sampling, progress=progress)
    parts = images.split([len(labels) for labels in bench.labels.values()])
    return {
        split: (part, evaluate(bench.judge, part, labels))
        for (split, labels), part in zip(bench.labels.items(), parts, strict=True)
    }


def draw_frechet(
    bench: Bench, sampling: SamplingConfig, seed: int, count: int, progress: bool = True
) -> float:
    """Frechet distance of `count` pictures, their conditions drawn from the training pictures'.

    Every way of sampling gets the same conditions and noise for a seed. Only the first process
    computes it, the others get NaN.
    """
    labels = draw_conditions(bench.reference, count, seed)
    seeds = picture_seeds(seed, count, purpose=2)
    images, _ = bench.sample(labels, seeds, sampling, progress=progress)
    if not processes.is_main():
        return math.nan
    return frechet_distance(bench.reference.features, bench.judge.features(images))


def settings_key(num_fd_samples: int, bench: Bench, sampling: SamplingConfig) -> str:
    """Hash of all that a draw depends on but its seed: draws of other settings are never mixed in.

    It names the folder of the results.
    """
    how = to_dict(replace(sampling, batch_size=1))
    if sampling.compose == "joint":  # draws from before there was a choice stay what they were
        del how["compose"]
    parts = {
        "figures": [*SHARES],  # draws from before there was one of them lack it
        "checkpoint": bench.blob,
        "judge": bench.judge and bench.judge.blob,
        "guide": bench.guide and bench.guide.blob if bench.guide is not bench.judge else None,
        "fd": num_fd_samples if bench.reference else 0,
        "training": bench.reference and bench.reference.key,
        "labels": {split: labels.tolist() for split, labels in bench.labels.items()},
        "sampling": how,
        "arithmetic": bench.arithmetic(sampling),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


@dataclass
class Draw:
    """One draw of all splits: a record for each, and the Frechet distance if asked for."""

    records: dict[str, Record]
    frechet: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """What a script keeps beside, JSON-able."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """`provenance`."""


Draws = dict[tuple[float, int], Draw]
"""(guidance scale, seed) -> draw."""


def split_records(splits: dict[str, tuple[Tensor, Evaluation]]) -> dict[str, Record]:
    """What is kept of `draw_splits`."""
    return {split: record(result) for split, (_, result) in splits.items()}


def read_draws(path: Path) -> Draws:
    """Draws made before; a line cut short by a kill is left out, and drawn again."""
    draws = {}
    for kept in read_lines(path):
        with contextlib.suppress(TypeError, KeyError):
            draw = Draw(kept["records"], kept["frechet"], kept["more"], kept.get("made_by", {}))
            draws[kept["scale"], kept["seed"]] = draw
    return draws


def origin(bench: Bench, draws: Iterable[Draw]) -> dict[str, Any]:
    """Which checkpoint and which commands a report's draws come from, JSON-able."""
    made_by = [draw.made_by for draw in draws if draw.made_by]
    return {
        "checkpoint_blob": bench.blob,
        "epoch": bench.checkpoint.epoch,
        "step": bench.checkpoint.step,
        "made_by": [by for i, by in enumerate(made_by) if by not in made_by[:i]],
    }


def draw_missing(
    path: Path,
    wanted: Sequence[tuple[float, int]],
    draw: Callable[[float, int], Draw],
    made_by: dict[str, Any],
    again: Collection[tuple[float, int]] = (),
) -> Draws:
    """The draws that a file keeps, with those that it lacks made and added one by one.

    Args:
        path: draws.jsonl in the folder of the results.
        wanted: (guidance scale, seed) of each.
        draw: makes one of them, with all processes.
        made_by: `provenance` of those that are made now.
        again: those to be made even though they are there.
    """
    draws = processes.from_main(read_draws(path))
    todo = [which for which in wanted if which not in draws or which in again]
    if len(todo) < len(wanted):
        there = len(wanted) - len(todo)
        print(f"{there} of {len(wanted)} draws are there already: {path.parent}")
    for scale, seed in progress_bar(todo, shown=len(todo) > 1, desc="draws", unit="draw"):
        draws[scale, seed] = replace(draw(scale, seed), made_by=made_by)
        if processes.is_main():
            line = json.dumps({"scale": scale, "seed": seed} | vars(draws[scale, seed]))
            append(path, f"\n{line}")  # the newline ends a line that a kill has cut short
    return draws
