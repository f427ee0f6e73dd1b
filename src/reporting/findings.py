"""What there is of a run: its settings, log and previews."""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from judging.evaluator import git_blob_hash
from network.checkpoint import load_checkpoint
from network.model import stages
from reporting.pictures import grid_uri, is_number
from reporting.results import Start
from runtime.command_line import command
from runtime.files import read_json
from runtime.settings import Settings, TrainConfig, UserError, from_dict
from training.history import History
from training.recipes import RECIPES
from training.run_folder import latest_checkpoint

NOT_OF_THE_TRAINING = {"recipe", "run_name", "output_dir", "resume", "wandb", "wandb_project"}
"""Settings that change nothing about the network."""
PREVIEWS = 8
"""Previews that are shown of a long training."""


@dataclass(frozen=True)
class Run:
    """A run's folder, or a network by itself, and where its results lie."""

    config: TrainConfig
    folder: Path | None
    """None for a checkpoint outside of a run's folder."""
    checkpoint: Path | None
    """The latest, or the one that was asked for."""
    result_dir: Path
    """Folder of all runs' results."""
    step: int | None = None
    epoch: int | None = None
    """The checkpoint's, where it was asked for."""

    @property
    def results(self) -> Path:
        """Folder of this run's results."""
        return self.result_dir / self.config.run_name

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """metrics.jsonl, but for damaged lines."""
        if self.folder is None:
            return []
        lines = History(self.folder / "metrics.jsonl").records()
        return [line for line in lines if is_number(line["step"]) and is_number(line.get("epoch"))]

    def of_log(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log that hold something."""
        return [line for line in self.log if name in line]

    @cached_property
    def blob(self) -> str | None:
        """git's hash of the checkpoint."""
        return git_blob_hash(self.checkpoint) if self.checkpoint else None


def find_run(output_dir: Path, run_name: str, ckpt_path: Path | None, result_dir: Path) -> Run:
    """A run by its name, or by a checkpoint.

    Raises:
        UserError: it is not there, nothing has been trained in its folder yet, or its settings are
            damaged.
    """
    if ckpt_path:
        found, parent = load_checkpoint(ckpt_path), ckpt_path.absolute().parent
        folder = parent.parent if parent.name == "checkpoints" else None
        return Run(found.config, folder, ckpt_path, result_dir, found.step, found.epoch)
    folder = output_dir / run_name
    train = f"python src/train.py --run_name {run_name}"
    if not folder.is_dir():
        known = ", ".join(sorted(path.parent.name for path in output_dir.glob("*/config.json")))
        raise UserError(
            f"--run_name {run_name}: no such run in {output_dir} (there: {known or 'none'}); "
            f"{train} trains it, --ckpt_path FILE reports a network by itself"
        )
    path = folder / "config.json"
    remedy = f"{train} trains it, --ckpt_path FILE takes the settings from a checkpoint"
    config = from_dict(TrainConfig, read_json(path, remedy), source=str(path))
    return Run(config, folder, latest_checkpoint(folder), result_dir)


def commands(run: Run) -> dict[str, str]:
    """What to type for what is missing."""
    where, data = ("--output_dir", run.result_dir), run.config.data
    of = ("--ckpt_path", run.checkpoint or "CHECKPOINT", *where)
    of += ("--data_dir", data.data_dir) if data.data_dir else ()
    if run.folder is None:  # no log will come to it, but to a run that starts from it
        go_on = ("--run_name", "more", "--init_from", run.checkpoint)
    elif run.checkpoint:
        go_on = ("--resume", run.folder)
    else:
        go_on = ("--run_name", run.folder.name, "--output_dir", run.folder.parent)
    others = [command("test", *of, "--scheduler", name) for name in ("ddim", "dpmpp")]
    return {
        "train": command("train", *go_on),
        "test": command("test", *of),
        "frechet": command("test", *of, "--num_fd_samples", 2048),
        "samplers": "\n".join(others),
        "sweep": command("guidance_scale", *of),
    }


def training(run: Run) -> dict[str, Any]:
    """What was trained and how it went."""
    rows, parameters, flops = stages(run.config.model)
    starts = {}
    for line in run.of_log("command"):
        with contextlib.suppress(UserError):
            starts[line["step"]] = from_dict(Start, line, "")  # of a step, the last one counts
    last = run.log[-1] if run.log else {"step": None, "epoch": None}
    return {
        "settings": differing(run.config, RECIPES[run.config.recipe]),
        "stages": rows,
        "parameters": parameters,
        "flops": flops,
        "starts": [*starts.values()],
        "logged": last["step"],
        "step": run.step or last["step"],
        "epoch": last["epoch"] if run.epoch is None else run.epoch,
        "previews": previews(run),
    }


def differing(config: Settings, recipe: Settings) -> list[tuple[str, str, str]]:
    """Flag, value and the recipe's value of all settings that are not the recipe's."""
    found = []
    for name, value in vars(config).items():
        other = getattr(recipe, name)
        if isinstance(value, Settings):
            found += differing(value, other)
        elif value != other and name not in NOT_OF_THE_TRAINING:
            found.append((f"--{name}", in_words(value), in_words(other)))
    return found


def in_words(value: Any) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def previews(run: Run) -> list[dict[str, Any]]:
    """Some of the previews, evenly spread from first to last: log line and first row."""
    lines = [line for line in run.of_log("picture") if isinstance(line["picture"], str)]
    count = min(PREVIEWS, len(lines))
    chosen = [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]
    return [line | {"image": grid_uri(run.folder / line["picture"], rows=1)} for line in chosen]
