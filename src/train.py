"""Train the conditional DDPM.

    python src/train.py --epochs 500
    python src/train.py --recipe small --epochs 20  # a small network, on a CPU
    python src/train.py --resume auto          # go on after an interruption
    python src/train.py --init_from data/standin/model.pth    # start from a trained network
    accelerate launch --num_processes 8 --multi_gpu src/train.py    # the same steps on 8 GPUs

Writes output/<run_name>/: config.json, metrics.jsonl, checkpoints/model_epoch_N.pth and previews
samples/epoch_N.png, whose accuracy is logged.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion import doubts
from diffusion.samplers import check_steps
from iclevr.dataset import DataPaths, find_data, get_dataloader
from iclevr.labels import condition_files, read_conditions, read_objects
from judging.evaluator import Evaluator, load_evaluator
from network.model import DiffusionModel, summary
from runtime import processes
from runtime.command_line import command
from runtime.device import pick_device, warn_of_launcher
from runtime.files import check_folder, make_folder
from runtime.provenance import provenance
from runtime.settings import TrainConfig, UserError, run
from training.preview import Preview, preview_sampling
from training.resume import read_config
from training.reward import reward_sampling
from training.run_folder import latest_checkpoint, own_folder
from training.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Train; returns the path of the last checkpoint."""
    config, source = read_config(argv)
    if config.dry_run:
        print(summary(config.model))
        return None
    run_dir, latest = config.run_dir, latest_checkpoint(config.run_dir)
    device = pick_device(config.device)
    warn_of_launcher(config.mixed_precision)

    # All that is quick to find out comes first, then the pictures.
    paths = find_data(config.data)
    objects = read_objects(paths.data_dir)
    check_settings(config, paths, objects, device)
    judge, teacher, reward_model = load_evaluators(config, paths, objects, device)
    read_conditions(condition_files(paths.data_dir)["test"], objects)  # of the previews
    check_folder(run_dir)
    loader = get_dataloader(
        paths.data_dir, paths.image_dir, "train", config.batch_size, config.num_workers,
        config.model.image_size, config.seed, config.horizontal_flip, config.objects_power,
        cache_dir=paths.cache_dir, pin_memory=device.type == "cuda",
        follow_links=paths.follow_links,
    )  # fmt: skip
    check_shares(config, loader.batch_sampler.batch_size)  # smaller, where pictures are few

    preview = Preview(config, paths, objects, judge)
    trainer = Trainer(config, loader, objects, preview, device, teacher, reward_model)
    if config.resume:
        trainer.resume(source)
    elif source:
        trainer.start_from(source)
    del source  # memory is the training's
    if trainer.done and not trainer.preview_owed:
        limited = trainer.total_steps == config.max_train_steps
        flag = "--max_train_steps" if limited else "--epochs"
        message = f"{trainer.saved}: all {trainer.state.step} steps are done; raise {flag} to go on"
        if config.resume != "auto":
            raise UserError(message)
        print(message)  # no mistake: a job that is submitted once more finds its work done
        return trainer.saved
    if config.compile:
        trainer.state.model.compile()  # in place: names of weights stay as they are

    doubts.warn(doubts.of_training(config, trainer.total_steps, len(loader.dataset)))
    make_folder(run_dir)
    with own_folder(run_dir, latest):
        print(f"data: {len(loader.dataset)} pictures, {paths.image_dir}")
        of_judge = f"{judge.name}, {judge.path}" if judge else "none, previews get no accuracy"
        print(f"judge: {of_judge}")
        print(
            f"run: {run_dir}, {device}, {trainer.dtype or torch.float32}, "
            f"step {trainer.state.step} of {trainer.total_steps}"
        )
        if processes.world_size() > 1:
            share = f"its share of {trainer.batch_size} pictures"
            print(f"processes: {processes.world_size()}, each with {share}")
        trainer.note_start(provenance(__file__, argv, device))
        saved = trainer.train()
    print(f"saved {saved}\nnext: {command('test', '--ckpt_path', saved)}")
    return saved


def check_settings(
    config: TrainConfig, paths: DataPaths, objects: dict[str, int], device: torch.device
) -> None:
    """Refuse settings that don't fit each other, the data's objects or this machine."""
    check_steps(config.noise, preview_sampling(config), flag="--preview_steps")
    if config.reward.reward_model:
        check_steps(config.noise, reward_sampling(config), flag="--reward_steps")
        if config.reward.reward_guidance_scale == 0:
            raise UserError(
                "--reward_guidance_scale 0: draws without the condition, of which a classifier can "
                "teach nothing; use 1 or more"
            )
    with torch.device("meta"):
        DiffusionModel(config.model)  # settings that don't fit together end here
    if len(objects) != config.model.num_classes:
        raise UserError(
            f"{paths.data_dir / 'objects.json'}: {len(objects)} objects, but --num_classes "
            f"{config.model.num_classes}; set --num_classes {len(objects)}"
        )
    check_shares(config, config.batch_size)
    if config.model.dropout == 1:
        raise UserError("--dropout 1: nothing is left of what a ResBlock computes; use less")
    if config.lr * config.weight_decay >= 1:
        raise UserError(
            f"--weight_decay {config.weight_decay:g}: with --lr {config.lr:g} every step takes "
            "away all of the weights; their product must be far below 1"
        )
    if config.compile:
        try:
            torch.compile(torch.square)(torch.ones(2, device=device))
        except Exception as error:  # of whichever compiler, each has its own
            why = " ".join(str(error).split())[:160]
            raise UserError(f"--compile: torch.compile fails here ({why}); leave it out") from None


def check_shares(config: TrainConfig, batch_size: int) -> None:
    """Refuse a batch without a picture for each part of every process's share."""
    parts = config.gradient_accumulation_steps
    if batch_size < processes.world_size() * parts:
        raise UserError(
            f"--batch_size {batch_size}: fewer pictures than {processes.world_size()} process(es) "
            f"times --gradient_accumulation_steps {parts}"
        )


def load_evaluators(
    config: TrainConfig, paths: DataPaths, objects: dict[str, int], device: torch.device
) -> tuple[Evaluator | None, Evaluator | None, Evaluator | None]:
    """The judge of the previews, if there is one, and the classifiers of two flags, where given.

    These are --align_to and --reward_model.

    Raises:
        UserError: as `load_evaluator`; a flag needs a judge; or a classifier is the judge, who
            must not know its pupil.
    """
    judge = load_evaluator(paths.evaluator, objects, device) if paths.evaluator else None
    if judge is None and (config.keep_best or config.preview.preview_fd_samples):
        flag = "--keep_best" if config.keep_best else "--preview_fd_samples"
        raise UserError(f"{flag}: needs a judge; name one with --evaluator")
    classifiers: list[Evaluator | None] = []
    for flag, path in (
        ("--align_to", config.align_to),
        ("--reward_model", config.reward.reward_model),
    ):
        classifiers.append(load_evaluator(path, objects, device) if path else None)
        if path and judge and judge.blob == classifiers[-1].blob:
            raise UserError(
                f"{flag} {path}: is the judge itself; train another classifier with "
                f"python src/train_evaluator.py --seed 1 --out FILE"
            )
    return judge, *classifiers


if __name__ == "__main__":
    run(main)
