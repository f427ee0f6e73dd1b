"""Train the conditional DDPM.

    python src/train.py --epochs 500
    python src/train.py --recipe small --epochs 20  # a small network, on a CPU
    python src/train.py --resume auto          # go on after an interruption
    python src/train.py --init_from data/standin/model.pth    # start from a trained network
    accelerate launch --num_processes 8 --multi_gpu src/train.py    # the same steps on 8 GPUs

Writes output/<run_name>/: config.json, metrics.jsonl, checkpoints/model_epoch_N.pth and previews
samples/epoch_N.png, whose accuracy is logged.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion.schedule import check_steps
from iclevr.dataset import (
    find_data,
    get_dataloader,
    read_conditions,
    read_objects,
)
from judging.evaluator import Evaluator, load_evaluator
from network.checkpoint import (
    load_weights,
)
from network.model import DiffusionModel, summary
from runtime import processes
from runtime.device import pick_device
from runtime.files import (
    check_folder,
    make_folder,
)
from runtime.settings import TrainConfig, UserError, run
from training.preview import Preview, preview_sampling
from training.resume import Source, latest_checkpoint, read_config
from training.step import TrainState
from training.trainer import NothingLeft, Trainer, own_folder


def start_from(state: TrainState, source: Source, objects: dict[str, int]) -> None:
    """Take over the averaged weights of --init_from; everything else starts afresh.

    Raises:
        UserError: it was trained for other objects.
    """
    path, checkpoint = source
    if checkpoint.objects != objects:
        raise UserError(f"--init_from {path}: was trained for other objects, or another order")
    for model in filter(None, (state.model, state.ema)):
        load_weights(model, checkpoint.ema or checkpoint.model, path, "its settings")


def check_shares(config: TrainConfig, batch_size: int) -> None:
    """Every process must have a picture for each part of its share.

    Raises:
        UserError: there are more parts than pictures in a batch.
    """
    parts = config.gradient_accumulation_steps
    if batch_size < processes.world_size() * parts:
        raise UserError(
            f"--batch_size {batch_size}: fewer pictures than {processes.world_size()} process(es) "
            f"times --gradient_accumulation_steps {parts}"
        )


def check_compiler(device: torch.device) -> None:
    """Try torch.compile on something small.

    Raises:
        UserError: it can't work here, for lack of a compiler.
    """
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # of whichever compiler, each has its own
        why = " ".join(str(error).split())[:160]
        raise UserError(f"--compile: torch.compile fails here ({why}); leave it out") from None


def load_teacher(
    path: Path, judge: Evaluator | None, objects: dict[str, int], device: torch.device
) -> Evaluator:
    """The classifier of --align_to.

    Raises:
        UserError: as `load_evaluator`; or it is the judge, which must not know its pupil.
    """
    teacher = load_evaluator(path, objects, device)
    if judge and judge.blob == teacher.blob:
        raise UserError(
            f"--align_to {path}: is the judge itself; train another classifier with "
            f"python src/train_evaluator.py --seed 1 --out FILE"
        )
    return teacher


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Train; returns the path of the last checkpoint."""
    config, source = read_config(argv)
    if config.dry_run:
        print(summary(config.model))
        return None
    run_dir, latest = config.run_dir, latest_checkpoint(config.run_dir)
    device = pick_device(config.device)
    # All that is quick to find out comes first, then the pictures.
    paths = find_data(config.data)
    check_steps(config.noise, preview_sampling(config), flag="--preview_steps")
    with torch.device("meta"):
        DiffusionModel(config.model)  # settings that don't fit together end here
    objects = read_objects(paths.data_dir)
    if len(objects) != config.model.num_classes:
        raise UserError(
            f"{paths.data_dir / 'objects.json'}: {len(objects)} objects, but --num_classes "
            f"{config.model.num_classes}; set --num_classes {len(objects)}"
        )
    judge = load_evaluator(paths.evaluator, objects, device) if paths.evaluator else None
    teacher = load_teacher(config.align_to, judge, objects, device) if config.align_to else None
    for flag, wanted in (
        ("--keep_best", config.keep_best),
        ("--preview_fd_samples", config.preview.preview_fd_samples),
    ):
        if wanted and judge is None:
            raise UserError(f"{flag}: needs a judge; name one with --evaluator")
    if config.compile:
        check_compiler(device)
    check_shares(config, config.batch_size)
    read_conditions(paths.data_dir, "test", objects)  # of the previews
    check_folder(run_dir)
    loader = get_dataloader(
        paths.data_dir, paths.image_dir, "train", config.batch_size, config.num_workers,
        config.model.image_size, config.seed, config.horizontal_flip,
        cache_dir=paths.cache_dir, pin_memory=device.type == "cuda",
    )  # fmt: skip
    check_shares(config, loader.batch_sampler.batch_size)  # smaller, where pictures are few
    preview = Preview(config, paths, objects, judge)
    trainer = Trainer(config, loader, objects, preview, device, teacher)
    state = trainer.state
    if config.resume:
        try:
            trainer.resume(source)
        except NothingLeft as message:
            if config.resume != "auto":
                raise
            print(message)  # no mistake: a job that is submitted once more finds its work done
            return source.path
    elif source:
        start_from(state, source, objects)
        print(f"start: weights of {source.path}, recipe {config.recipe} for the training")
    del source  # memory is the training's
    if config.compile:
        state.model.compile()  # in place: names of weights stay as they are

    make_folder(run_dir)
    with own_folder(run_dir, latest):
        print(f"data: {len(loader.dataset)} pictures, {paths.image_dir}")
        if judge:
            print(f"judge: {judge.name}, {judge.path}")
        else:
            print("judge: none, previews get no accuracy")
        print(
            f"run: {run_dir}, {device}, {trainer.dtype or torch.float32}, "
            f"step {state.step} of {trainer.total_steps}"
        )
        if processes.world_size() > 1:
            print(
                f"processes: {processes.world_size()}, each with its share of "
                f"{trainer.batch_size} pictures"
            )
        saved = trainer.train()
    print(f"saved {saved}\nnext: python src/test.py --ckpt_path {shlex.quote(str(saved))}")
    return saved


if __name__ == "__main__":
    run(main)
