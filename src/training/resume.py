"""Where a training starts: flags, and the checkpoint of --resume or --init_from."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from network.checkpoint import Checkpoint, DamagedFileError, load_checkpoint
from runtime.settings import TrainConfig, UserError, parse_args
from training.recipes import RECIPES

# What may differ from the interrupted run when going on: how long, where, and what is shown.
FREE_ON_RESUME = {
    "recipe", "resume", "epochs", "max_train_steps", "max_skipped_steps", "output_dir",
    "run_name", "save_interval", "sample_interval", "log_interval", "keep_last", "keep_best",
    "num_workers", "device", "compile", "wandb", "wandb_project", "dry_run", "data", "preview",
    "gradient_accumulation_steps", "align_to",
}  # fmt: skip


class Source(NamedTuple):
    """A checkpoint that was read, and its file."""

    path: Path
    checkpoint: Checkpoint


def read_config(argv: Sequence[str] | None) -> tuple[TrainConfig, Source | None]:
    """Flags, and the checkpoint of --resume or --init_from.

    On resuming, flags default to the checkpoint's settings; with --init_from, network and noise
    schedule default to its. --resume auto starts afresh where there is nothing to go on from.

    Raises:
        UserError: nothing to resume, a setting that can't change on the way, or a run folder
            that is in use already.
    """
    argv = sys.argv[1:] if argv is None else argv
    # --help waits for its defaults, which are the recipe's.
    config = parse_args(TrainConfig, [flag for flag in argv if flag not in ("-h", "--help")])
    default, source = RECIPES[config.recipe], None
    resuming = config.resume is not None
    if config.resume == "auto" and not latest_checkpoint(config.run_dir):
        resuming = False
    if config.init_from and not resuming:
        source = Source(config.init_from, load_checkpoint(config.init_from))
        start = source.checkpoint.config
        default = replace(default, model=start.model, noise=start.noise)
        config = parse_args(TrainConfig, argv, default=default)
        for kind in ("model", "noise"):
            for name, value in vars(getattr(start, kind)).items():
                if (given := getattr(getattr(config, kind), name)) != value:
                    raise UserError(
                        f"--{name} {given}: {config.init_from} was trained with {value}; "
                        "leave the flag out"
                    )
    else:
        config = parse_args(TrainConfig, argv, default=default)
    if config.dry_run:
        return config, None
    if resuming:
        return go_on(config, argv)
    if latest_checkpoint(config.run_dir):
        raise UserError(
            f"{config.run_dir}: holds a run already; go on with --resume auto, "
            "or choose another --run_name"
        )
    if config.resume:
        print(f"--resume auto: no checkpoint in {config.run_dir}: starting afresh")
    return replace(config, resume=None), source


def go_on(config: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, Source]:
    """The checkpoint that --resume names, and flags with its settings as defaults.

    Raises:
        UserError: there is none, it holds no training to go on with, later ones are there, or a
            flag changes what can't change on the way.
    """
    given = config.run_dir if config.resume == "auto" else Path(config.resume)
    if given.is_file():
        source = Source(given, load_checkpoint(given))
    else:
        source = latest_whole_checkpoint(given)
    if source is None:
        raise UserError(f"--resume {config.resume}: no checkpoint in {given / 'checkpoints'}")
    path, checkpoint = source
    if path.absolute().parent.name != "checkpoints":
        raise UserError(f"--resume {config.resume}: must lie in a run's folder, in checkpoints/")
    run_dir = path.absolute().parents[1]  # go on where the checkpoint lies
    if given.is_file() and path.absolute() != latest_checkpoint(run_dir):
        raise UserError(
            f"--resume {config.resume}: {run_dir} holds later checkpoints; move them away first"
        )
    if not checkpoint.training:
        raise UserError(
            f"--resume {config.resume}: {path} comes from src/export.py, without the optimiser's "
            "state; resume from a checkpoint of src/train.py"
        )
    stored = checkpoint.config
    config = parse_args(TrainConfig, argv, default=stored)
    for name in vars(stored):
        if name not in FREE_ON_RESUME and getattr(config, name) != getattr(stored, name):
            raise UserError(
                f"--{name} {getattr(config, name)}: {path} was trained with "
                f"{getattr(stored, name)}; leave the flag out or start another --run_name"
            )
    return replace(config, output_dir=run_dir.parent, run_name=run_dir.name), source


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, by epoch."""
    found = {
        int(path.stem.rsplit("_", 1)[1]): path
        for path in (run_dir / "checkpoints").glob("model_epoch_*.pth")
        if path.stem.rsplit("_", 1)[1].isdigit()
    }
    return [found[epoch] for epoch in sorted(found)]


def resumable(run_dir: Path) -> list[Path]:
    """What a run can go on from, the last is the best choice.

    best.pth is the first: it may be all there is of a run that was killed early.
    """
    best = run_dir / "checkpoints" / "best.pth"
    return [best] * best.exists() + checkpoints(run_dir)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The last of `resumable`, or None."""
    return next(reversed(resumable(run_dir)), None)


def latest_whole_checkpoint(run_dir: Path) -> Source | None:
    """The latest one that can be read; says which damaged ones it passes over.

    Raises:
        UserError: there are some, but all are damaged, or one can't be read for another reason.
    """
    error = None
    for path in reversed(resumable(run_dir)):
        try:
            return Source(path, load_checkpoint(path))
        except DamagedFileError as caught:
            error = error or caught
            print(f"warning: {caught.what}; looking for an earlier one", file=sys.stderr)
    if error is not None:
        raise error
    return None
