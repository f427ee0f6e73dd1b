"""The settings of a training: its flags, with defaults from the checkpoint that it starts from."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from network.checkpoint import load_checkpoint
from runtime.settings import Settings, TrainConfig, UserError, parse_args
from training.recipes import RECIPES
from training.run_folder import Source, latest_checkpoint, latest_whole_checkpoint

# What may differ from the interrupted run when going on: how long, where, and what is shown.
FREE_ON_RESUME = {
    "recipe", "resume", "epochs", "max_train_steps", "max_skipped_steps", "output_dir",
    "run_name", "save_interval", "sample_interval", "log_interval", "keep_last", "keep_best",
    "num_workers", "device", "compile", "wandb", "wandb_project", "dry_run", "data", "preview",
    "gradient_accumulation_steps", "align_to",
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
    config = parse_args(TrainConfig, [flag for flag in argv if flag not in ("-h", "--help")])
    begun = latest_checkpoint(config.run_dir)
    resuming = config.resume and (config.resume != "auto" or begun)
    default, source = RECIPES[config.recipe], None
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


def go_on(config: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, Source]:
    """The checkpoint that --resume names, and flags with its settings as defaults.

    Raises:
        UserError: there is none, it holds no training to go on with, later ones are there, or a
            flag changes what can't change on the way.
    """
    flag = f"--resume {config.resume}"
    given = config.run_dir if config.resume == "auto" else Path(config.resume)
    if given.is_file():
        source = Source(given, load_checkpoint(given))
        if given.absolute().parent.name != "checkpoints":
            raise UserError(f"{flag}: must lie in a run's folder, in checkpoints/")
        run_dir = given.absolute().parents[1]
        if given.absolute() != latest_checkpoint(run_dir):
            raise UserError(f"{flag}: {run_dir} holds later checkpoints; move them away first")
    else:
        source, run_dir = latest_whole_checkpoint(given), given.absolute()
    if source is None:
        raise UserError(f"{flag}: no checkpoint in {given / 'checkpoints'}")
    path, checkpoint = source
    if not checkpoint.training:
        raise UserError(
            f"{flag}: {path} comes from src/export.py, without the optimiser's state; resume from "
            "a checkpoint of src/train.py"
        )
    config = parse_args(TrainConfig, argv, default=checkpoint.config)
    remedy = "leave the flag out or start another --run_name"
    check_unchanged(config, checkpoint.config, path, remedy, FREE_ON_RESUME)
    # Where the checkpoint lies now: its folder may have been moved.
    return replace(config, output_dir=run_dir.parent, run_name=run_dir.name), source


def check_unchanged(
    config: Settings, stored: Settings, path: Path, remedy: str, free: Collection[str] = ()
) -> None:
    """Settings equal those stored in the checkpoint `path`, but for the ones named in `free`.

    Raises:
        UserError: one differs; ends with `remedy`.
    """
    for name, value in vars(stored).items():
        given = getattr(config, name)
        if name in free or given == value:
            continue
        if isinstance(value, Settings):
            check_unchanged(given, value, path, remedy)
        raise UserError(f"--{name} {given}: {path} was trained with {value}; {remedy}")
