"""The settings of a training: its flags, with defaults from the checkpoint that it starts from."""

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from network.checkpoint import load_checkpoint
from runtime.settings import Settings, TrainConfig, UserError, from_dict, parse_args, to_dict
from training.recipes import RECIPES
from training.run_folder import (
    Source,
    latest_checkpoint,
    latest_whole_checkpoint,
    resumable,
)

# What may differ from the interrupted run when going on: how long, where, and what is shown.
FREE_ON_RESUME = {
    "recipe", "resume", "epochs", "max_train_steps", "max_skipped_steps", "output_dir",
    "run_name", "save_interval", "sample_interval", "log_interval", "keep_last", "keep_best",
    "num_workers", "device", "compile", "wandb", "wandb_project", "dry_run", "data", "preview",
    "gradient_accumulation_steps", "align_to", "reward_model", "mixed_precision",
}  # fmt: skip


def read_config(argv: Sequence[str] | None) -> tuple[TrainConfig, Source | None]:
    """Flags, and the checkpoint of --resume or --init_from.

    On resuming, flags default to the checkpoint's settings; with --init_from, network and noise
    schedule default to its, and only the network's embeddings may be wider. --resume auto starts
    afresh where there is nothing to go on from.

    Raises:
        UserError: nothing to resume, a setting that can't change on the way, or a run folder
            that is in use already.
    """
    argv = sys.argv[1:] if argv is None else argv
    # --help waits for its defaults, which are the recipe's.
    flags = [flag for flag in argv if flag not in ("-h", "--help")]
    config = parse_args(TrainConfig, flags, of_trial(TrainConfig()))
    begun = latest_checkpoint(config.run_dir)
    resuming = config.resume and (config.resume != "auto" or begun)
    default, source = of_trial(RECIPES[config.recipe]), None
    if config.init_from and not resuming:
        source = Source(config.init_from, load_checkpoint(config.init_from))
        start = source.checkpoint.config
        default = replace(default, model=start.model, noise=start.noise)
    config = parse_args(TrainConfig, argv, default)
    if source:
        remedy = "leave the flag out"
        check_unchanged(config.model, start.model, source.path, remedy, {"time_embedding_dim"})
        check_unchanged(config.noise, start.noise, source.path, remedy)
    if config.dry_run:
        return config, None
    if resuming:
        return go_on(config, argv)
    if begun:
        raise UserError(
            f"{config.run_dir}: holds a run already; go on with --resume auto, "
            "or choose another --run_name"
        )
    if config.resume:
        print(f"--resume auto: no checkpoint in {config.run_dir}: starting afresh")
    return replace(config, resume=None), source


def of_trial(default: TrainConfig) -> TrainConfig:
    """Defaults in a sweep of Weights & Biases, whose trials would all take one run folder."""
    if "WANDB_SWEEP_ID" not in os.environ or "WANDB_RUN_ID" not in os.environ:
        return default
    return replace(default, run_name=f"{default.run_name}-{os.environ['WANDB_RUN_ID']}")


def go_on(config: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, Source]:
    """The checkpoint that --resume names, and flags with its settings as defaults.

    Raises:
        UserError: there is none, it holds no training to go on with, later ones are there, or a
            flag changes what can't change on the way.
    """
    flag = f"--resume {config.resume}"
    auto = config.resume == "auto"
    given = config.run_dir if auto else Path(os.path.expanduser(config.resume))
    if given.is_file():
        run_dir = run_of(given, flag)
        source = Source(given, load_checkpoint(given))
    else:
        source, run_dir = latest_whole_checkpoint(given), given.resolve()
    if source is None:
        raise UserError(f"{flag}: no checkpoint in {given / 'checkpoints'}")
    path, checkpoint = source
    if not checkpoint.training:
        raise UserError(
            f"{flag}: {path} comes from src/export.py, without the optimiser's state; resume from "
            "a checkpoint of src/train.py"
        )
    config = parse_args(TrainConfig, argv, default=on_this_machine(checkpoint.config))
    remedy = "leave the flag out or start another --run_name"
    check_unchanged(config, checkpoint.config, path, remedy, FREE_ON_RESUME)
    check_there(config, checkpoint.config, path)
    # Where the checkpoint lies now: its folder may have been moved, copied or renamed.
    config = replace(config, output_dir=run_dir.parent, run_name=run_dir.name)
    return from_dict(TrainConfig, to_dict(config), flag), source  # as a reader will get it


def run_of(file: Path, flag: str) -> Path:
    """The folder of the run that a checkpoint, or a link to one, is the last of.

    Raises:
        UserError: it lies in no run, or is not its last.
    """
    # A link is followed only where it leads into a run: checkpoints/ itself may be a link, too.
    there = file.absolute()
    there = there if there.parent.name == "checkpoints" else file.resolve()
    if there.parent.name != "checkpoints":
        raise UserError(f"{flag}: must lie in a run's folder, in checkpoints/")
    run_dir = there.parents[1].resolve()
    latest = latest_checkpoint(run_dir)
    if latest and not latest.samefile(file):
        among = any(path.samefile(file) for path in resumable(run_dir))
        kind = "later checkpoints" if among else "checkpoints beside it"
        raise UserError(f"{flag}: {run_dir} holds {kind}, such as {latest.name}; move them away")
    return run_dir


def on_this_machine(stored: TrainConfig) -> TrainConfig:
    """The stored settings without what may be different, or missing, on another machine.

    Somebody who wants no login, or nothing logged, wants neither elsewhere.
    """
    plain = TrainConfig()
    return replace(
        stored,
        device=plain.device,
        compile=plain.compile,
        num_workers=plain.num_workers,
        wandb="auto" if stored.wandb == "online" else stored.wandb,
        data=replace(stored.data, cache_dir=None),
    )


def check_there(config: TrainConfig, stored: TrainConfig, path: Path) -> None:
    """Refuse files and folders that are taken from the checkpoint `path` and are not there."""
    taken, before = (
        vars(settings.data)
        | {"align_to": settings.align_to, "reward_model": settings.reward.reward_model}
        for settings in (config, stored)
    )
    for name, value in taken.items():
        if isinstance(value, Path) and value == before[name] and not value.exists():
            raise UserError(
                f"{path}: was trained with --{name} {value}, which is not there; "
                f"name another with --{name}"
            )


def check_unchanged(
    config: Settings, stored: Settings, path: Path, remedy: str, free: Collection[str] = ()
) -> None:
    """Refuse settings that differ from those in the checkpoint `path`, but for those in `free`."""
    for name, value in vars(stored).items():
        given = getattr(config, name)
        if isinstance(given, Path):  # stored as absolute
            given = given.absolute()
        if name in free or given == value:
            continue
        if isinstance(value, Settings):
            check_unchanged(given, value, path, remedy, free)
            continue
        raise UserError(f"--{name} {given}: {path} was trained with {value}; {remedy}")
