"""Train the conditional DDPM.

    python src/train.py --epochs 500
    python src/train.py --recipe small --epochs 20  # a small network, on a CPU
    python src/train.py --resume auto          # go on after an interruption
    python src/train.py --init_from data/standin/model.pth    # start from a trained network
    accelerate launch --num_processes 8 --multi_gpu src/train.py    # the same steps on 8 GPUs

Writes output/<run_name>/: config.json, metrics.jsonl, checkpoints/model_epoch_N.pth and previews
samples/epoch_N.png, whose accuracy is logged.
"""

import contextlib
import copy
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import processes
from checkpoint import (
    Checkpoint,
    DamagedFileError,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from config import RECIPES, SamplingConfig, TrainConfig, UserError, parse_args, run, to_dict
from dataset import (
    DataPaths,
    IclevrDataset,
    find_data,
    get_dataloader,
    read_conditions,
    read_objects,
)
from device import autocast, autocast_dtype, pick_device
from diffusion import (
    check_steps,
    derive_seed,
    draw_timesteps,
    drop_labels,
    make_scheduler,
    picture_seeds,
    sample,
    scale,
    training_loss,
)
from evaluator import Evaluator, evaluate, load_evaluator
from figures import grid, save_image
from files import atomic_write, lock_folder, make_folder, remove_left_overs, write_json
from metrics import record, summarise
from model import DiffusionModel, summary, zero_init
from optimizer import make_optimizer
from realism import draw_conditions, frechet_distance, load_reference
from tracking import Tracker

# What may differ from the interrupted run when going on: how long, where, and what is shown.
FREE_ON_RESUME = {
    "recipe", "resume", "epochs", "max_train_steps", "max_skipped_steps", "output_dir",
    "run_name", "save_interval", "sample_interval", "log_interval", "keep_last", "keep_best",
    "num_workers", "device", "compile", "wandb", "wandb_project", "dry_run", "data", "preview",
    "gradient_accumulation_steps",
}  # fmt: skip


@dataclass
class TrainState:
    """Everything that training changes."""

    model: DiffusionModel
    parallel: nn.Module
    """The same network; its gradients are the mean over all processes."""
    ema: DiffusionModel | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    skipped: Tensor
    """(2,) on the device: steps skipped for NaN or infinite gradients, in all and in a row."""
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps since the last line of metrics.jsonl, where training goes on."""

    def training_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load(self, checkpoint: Checkpoint, path: Path) -> None:
        """Take over what a checkpoint holds.

        Raises:
            UserError: it is not of this network and optimiser.
        """
        load_weights(self.model, checkpoint.model, path, "its settings")
        if self.ema is not None:
            load_weights(self.ema, checkpoint.ema, path, "its settings")
        try:
            self.optimizer.load_state_dict(checkpoint.training["optimizer"])
            self.lr_scheduler.load_state_dict(checkpoint.training["lr_scheduler"])
            self.scaler.load_state_dict(checkpoint.training["scaler"])
            self.skipped.copy_(checkpoint.training.get("skipped", self.skipped))
            self.losses = [loss.to(self.skipped.device)
                           for loss in checkpoint.training.get("losses", [])]  # fmt: skip
        except Exception as error:  # whatever the loaders make of a stranger's content
            why = " ".join(str(error).split())[:100]
            raise UserError(
                f"{path}: what it holds of the optimiser doesn't fit ({type(error).__name__}: "
                f"{why}); resume from another checkpoint"
            ) from None
        self.step = checkpoint.step


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
    plain = [flag for flag in argv if flag not in ("-h", "--help")]  # its defaults: the recipe's
    config = parse_args(TrainConfig, plain)
    default = RECIPES[config.recipe]
    resuming = config.resume is not None
    if config.resume == "auto" and not latest_checkpoint(config.output_dir / config.run_name):
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
        source = None
        config = parse_args(TrainConfig, argv, default=default)
    run_dir = config.output_dir / config.run_name
    if config.dry_run:
        return config, None
    if not resuming:
        if latest_checkpoint(run_dir):
            raise UserError(
                f"{run_dir}: holds a run already; go on with --resume auto, "
                "or choose another --run_name"
            )
        if config.resume:
            print(f"--resume auto: no checkpoint in {run_dir}: starting afresh")
        return replace(config, resume=None), source
    given = run_dir if config.resume == "auto" else Path(config.resume)
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
    """The checkpoint of the highest epoch in a run folder, or None."""
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
            print(f"warning: {caught}; looking for an earlier one", file=sys.stderr)
    if error is not None:
        raise error
    return None


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for all weights at once."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of one step, from (seed, step) alone: a resumed run draws the same ones."""
    value = derive_seed(seed, 1, step)
    # Dropout in the network draws from the global generator, for other pictures in each process.
    torch.manual_seed((value + processes.rank()) % 2**64)
    return torch.Generator(device).manual_seed(value)


def train_step(
    state: TrainState,
    config: TrainConfig,
    scheduler: Any,
    x_0: Tensor,
    labels: Tensor,
    dtype: torch.dtype | None,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimiser step.

    All random numbers are drawn for the whole batch, and each process takes its rows: the step is
    the same, but for rounding, however the batch is cut.

    Args:
        x_0:    (n, 3, H, W) in [-1, 1], this process's share of the batch
        labels: (n, K)
        count:  pictures of the whole batch; None: n

    Returns:
        scalars on the device: the loss's sum over this process's pictures, divided by `count`,
        and the norm of the whole batch's gradient.
    """
    device, count = x_0.device, count or len(x_0)
    generator = step_generator(config.seed, state.step, device)
    t = draw_timesteps(
        count, config.noise.num_train_timesteps, config.timestep_power,
        config.stratified_timesteps, generator,
    )  # fmt: skip
    eps = torch.randn(count, *x_0.shape[1:], device=device, generator=generator)
    kept = drop_labels(torch.ones(count, 1, device=device), config.cfg_dropout_prob, generator)
    mine = processes.shard(count)
    x_0, labels, t, eps = scale(x_0, config.noise), labels * kept[mine], t[mine], eps[mine]

    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    parts = config.gradient_accumulation_steps
    for number in range(parts):
        part = slice(len(x_0) * number // parts, len(x_0) * (number + 1) // parts)
        last = number == parts - 1  # processes exchange their gradients only then
        with contextlib.nullcontext() if last else no_sync(state.parallel):
            with autocast(device, dtype):
                losses = training_loss(
                    state.parallel, scheduler, x_0[part], labels[part], t[part], eps[part],
                    config.min_snr_gamma,
                )  # fmt: skip
            loss = losses.sum() / count
            # Gradients become their mean over processes: the sum is wanted.
            state.scaler.scale(loss * processes.world_size()).backward()
        total += loss.detach()

    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
    bad = ~grad_norm.isfinite()  # stays on the device: nothing waits for it
    if not state.scaler.is_enabled():
        # As GradScaler does for float16: the fused optimiser then leaves everything as it is.
        state.optimizer.found_inf = bad.float()
    state.skipped = torch.stack([state.skipped[0] + bad, (state.skipped[1] + 1) * bad])
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.lr_scheduler.step()
    if state.ema is not None:
        decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
        update_ema(state.ema, state.model, decay)
    state.step += 1
    return total, grad_norm


def no_sync(parallel: nn.Module) -> contextlib.AbstractContextManager:
    """Keep gradients in their process for now; nothing for a single process."""
    if isinstance(parallel, DistributedDataParallel):
        return parallel.no_sync()
    return contextlib.nullcontext()


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


def data_key(dataset: IclevrDataset) -> str:
    """Hash of the training pictures' names and labels, to resume on the same ones only."""
    key = hashlib.sha256("\n".join(dataset.names).encode("utf-8", "surrogatepass"))
    key.update(dataset.labels.numpy().tobytes())
    return key.hexdigest()


def build_state(config: TrainConfig, total_steps: int, device: torch.device) -> TrainState:
    """Network, average, optimiser and schedules before the first step."""
    torch.manual_seed(config.seed)
    model = DiffusionModel(config.model)
    if config.zero_init:
        zero_init(model)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    parallel = model
    if processes.world_size() > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return TrainState(
        model,
        parallel,
        copy.deepcopy(model).requires_grad_(False) if config.ema else None,
        optimizer,
        get_cosine_schedule_with_warmup(optimizer, config.lr_warmup_steps, total_steps),
        torch.amp.GradScaler(
            device.type, enabled=autocast_dtype(config.mixed_precision, device) == torch.float16
        ),
        torch.zeros(2, device=device),
    )


def preview_sampling(config: TrainConfig) -> SamplingConfig:
    """How previews are drawn."""
    return SamplingConfig(
        scheduler="ddim",
        num_inference_steps=config.preview.preview_steps,
        guidance_scale=config.preview.preview_guidance_scale,
        mixed_precision=config.mixed_precision,
    )


class Preview:
    """Draws the test conditions with the current weights, always from the same noise."""

    def __init__(
        self, config: TrainConfig, paths: DataPaths, objects: dict, judge: Evaluator | None
    ):
        _, self.labels = read_conditions(paths.data_dir, "test", objects)
        self.seeds = picture_seeds(config.seed, len(self.labels))
        self.noise = config.noise
        self.sampling = preview_sampling(config)
        self.judge = judge
        self.seed, self.fd_samples = config.seed, config.preview.preview_fd_samples
        if self.fd_samples:
            if judge is None:
                raise UserError("--preview_fd_samples: needs a judge; name one with --evaluator")
            self.reference = load_reference(paths, judge)
            if processes.is_main():
                _ = self.reference.features  # now: what fails should not fail hours later
        if config.keep_best and judge is None:
            raise UserError("--keep_best: needs a judge; name one with --evaluator")

    def __call__(self, model: DiffusionModel, path: Path) -> dict[str, Any]:
        """Write the grid; returns what to log, in the first process."""
        images, _ = sample(model, self.noise, self.labels, self.seeds, self.sampling)
        many = None
        if self.fd_samples:
            labels = draw_conditions(self.reference, self.fd_samples, self.seed)
            seeds = picture_seeds(self.seed, self.fd_samples, purpose=2)
            many, _ = sample(model, self.noise, labels, seeds, self.sampling)
        picture = grid(images)
        if not processes.is_main():
            return {}
        save_image(picture, path)
        values: dict[str, Any] = {"preview": picture}
        if self.judge is not None:
            values["judge"] = self.judge.name
            figures = summarise([record(evaluate(self.judge, images, self.labels))])
            values |= {f"preview_{name}": interval.mean for name, interval in figures.items()}
        if many is not None:
            values["preview_frechet_distance"] = frechet_distance(
                self.reference.features, self.judge.features(many)
            )
        return values


def previewed(run_dir: Path, step: int) -> bool:
    """Whether metrics.jsonl tells of a preview after this step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(Metrics.step(line) == step and '"picture"' in line for line in lines)


class Metrics:
    """metrics.jsonl, one line a record; on resuming, lines of lost steps are taken out."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists() and processes.is_main():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if self.step(line) <= step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    @staticmethod
    def step(line: str) -> float:
        """The step that a line is about; infinite if it can't be read."""
        try:
            return json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):  # cut short by a kill or a full disk
            return math.inf

    def write(self, record: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: can't be written: {error.strerror}") from None


class Stopped(Exception):
    """A preview was cut short by a signal."""


class StopSignal:
    """Ctrl-C and SIGTERM end training after the current step; a second one ends it at once.

    Within a second it still counts as the first: a terminal or a scheduler signals every process,
    and torch's launcher passes on what it got itself.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        self.at_once = False
        """Raise `Stopped` where the work is, which can be cut short."""

    def agreed(self) -> bool:
        """Whether any process has been told to stop, since when all of them are."""
        if number := processes.largest(self.number or 0):
            self.number = number
        return number != 0

    def __enter__(self) -> "StopSignal":
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number is not None:
            if time.monotonic() > self.since + 1:
                sys.exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if processes.is_main():
            print("\nstopping after this step; once more stops at once", file=sys.stderr)
        if self.at_once and processes.world_size() == 1:  # else the others would wait for ever
            raise Stopped


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Train; returns the path of the last checkpoint."""
    config, source = read_config(argv)
    resumed_from = source.path if source and config.resume else None
    if config.dry_run:
        print(summary(config.model))
        return None
    run_dir = config.output_dir / config.run_name
    latest = latest_checkpoint(run_dir)
    device = pick_device(config.device)
    dtype = autocast_dtype(config.mixed_precision, device)
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
    if config.compile:
        check_compiler(device)
    check_shares(config, config.batch_size)
    make_folder(run_dir)  # all that is quick to find out is known: now the pictures
    loader = get_dataloader(
        paths.data_dir, paths.image_dir, "train", config.batch_size, config.num_workers,
        config.model.image_size, config.seed, config.horizontal_flip,
        cache_dir=paths.cache_dir, pin_memory=device.type == "cuda",
    )  # fmt: skip
    steps_per_epoch, batch_size = len(loader), loader.batch_sampler.batch_size
    check_shares(config, batch_size)
    total_steps = min(config.epochs * steps_per_epoch, config.max_train_steps or sys.maxsize)
    state = build_state(config, total_steps, device)

    def preview_due() -> bool:
        epoch, batches = divmod(state.step, steps_per_epoch)
        whole = batches == 0 and state.step > 0
        return state.step == total_steps or (whole and epoch % config.sample_interval == 0)

    owed = False  # a preview that is due and has not been drawn
    if resumed_from:
        checkpoint = source.checkpoint
        if (checkpoint.objects, checkpoint.training.get("data")) != (
            objects,
            data_key(loader.dataset),
        ):
            raise UserError(
                f"{resumed_from}: was trained on other pictures than {paths.data_dir} holds now; "
                "name its --data_dir or start another --run_name"
            )
        state.load(checkpoint, resumed_from)
        if processes.from_main(state.step) != state.step:
            raise UserError(
                f"{resumed_from}: the first process goes on from another step; do all of them see "
                "the same --output_dir?"
            )
        owed = preview_due() and not processes.from_main(previewed(run_dir, state.step))
        if state.step >= total_steps and not owed:
            limit = "--max_train_steps" if total_steps == config.max_train_steps else "--epochs"
            raise UserError(
                f"{resumed_from}: all {state.step} steps are done; raise {limit} to go on"
            )
    elif config.init_from:
        start_from(state, source, objects)
        print(f"start: weights of {config.init_from}, recipe {config.recipe} for the training")
    if config.compile:
        state.model.compile()  # in place: names of weights stay as they are
    preview = Preview(config, paths, objects, judge)

    lock = contextlib.ExitStack()
    if processes.is_main():
        lock.callback(lock_folder(run_dir, "choose another --run_name").release)
        if latest_checkpoint(run_dir) != latest:
            raise UserError(
                f"{run_dir}: another process has trained here since this one started; start again"
            )
        for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples"):
            remove_left_overs(folder)
        write_json(run_dir / "config.json", to_dict(config))
    processes.wait_for_all()
    metrics = Metrics(run_dir / "metrics.jsonl", state.step)
    print(f"data: {len(loader.dataset)} pictures, {paths.image_dir}")
    print(
        f"judge: {judge.name}, {judge.path}" if judge else "judge: none, previews get no accuracy"
    )
    print(f"run: {run_dir}, {device}, {dtype or torch.float32}, step {state.step} of {total_steps}")
    if processes.world_size() > 1:
        print(f"processes: {processes.world_size()}, each with its share of {batch_size} pictures")
    tracker = Tracker(config.wandb, config.wandb_project, config.run_name, run_dir, to_dict(config))

    def check_skipped(limit: int) -> int:
        """Steps skipped so far; stops if the last `limit` were."""
        total, in_a_row = map(int, state.skipped.tolist())  # waits for the device
        if in_a_row >= limit:
            raise UserError(
                f"the last {in_a_row} steps before step {state.step} had NaN or infinite gradients "
                "and were skipped: start another --run_name with a lower --lr, or bf16 instead of "
                f"fp16; last checkpoint: {saved or 'none'}"
            )
        return total

    def save(name: str | None = None) -> Path:
        # A few skipped steps harm nothing; but no run ends well with a network that gives NaN.
        limit = config.max_skipped_steps
        check_skipped(min(limit, 10) if state.step == total_steps else limit)
        name = name or f"model_epoch_{math.ceil(state.step / steps_per_epoch)}.pth"
        path = run_dir / "checkpoints" / name
        logged_later = whole_batch(losses)
        if not processes.is_main():
            return path
        save_checkpoint(
            path,
            Checkpoint(
                replace(config, resume=None),
                objects,
                state.model.state_dict(),
                state.ema.state_dict() if state.ema else None,
                state.step // steps_per_epoch,
                state.step,
                state.training_state()
                | {"data": data_key(loader.dataset), "losses": list(logged_later), "best": best},
            ),
        )
        steady = not state.skipped[1]
        if config.keep_last and steady and path in (known := checkpoints(run_dir)):
            # Those up to this one: later ones are damaged, and will be written again.
            for old in known[: known.index(path) + 1][: -config.keep_last]:
                old.unlink()
        return path

    def whole_batch(losses: list[Tensor]) -> Tensor:
        """Each step's loss, of which every process knows its part."""
        return processes.total(torch.stack(losses)) if losses else torch.zeros(0)

    def log(values: dict[str, Any]) -> None:
        if not processes.is_main():
            return
        tracker.log(values, state.step)
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
        metrics.write({"step": state.step, "epoch": state.step / steps_per_epoch} | numbers)

    scheduler = make_scheduler(config.noise)
    shown: dict[str, str] = {}
    saved, saved_step, save_due = resumed_from, state.step, False
    losses = state.losses
    if resumed_from:
        if not processes.is_main():  # the parts of all processes add up to these
            losses = [torch.zeros_like(loss) for loss in losses]
        del checkpoint
    source = None  # memory is the training's
    best_path = run_dir / "checkpoints" / "best.pth"
    best = -1.0
    if best_path.exists():
        try:
            best = load_checkpoint(best_path).training.get("best", -1.0)
        except DamagedFileError as error:
            print(f"warning: {error}; the next best replaces it", file=sys.stderr)
    since, timed_from = time.perf_counter(), state.step

    def draw_preview() -> None:
        """Draw the test conditions; cut short by a signal, when the run goes on."""
        nonlocal owed, best, since, timed_from
        name = f"samples/epoch_{math.ceil(state.step / steps_per_epoch)}.png"
        try:
            stop.at_once = True
            values = preview(state.ema or state.model, run_dir / name)
        except Stopped:
            return
        finally:
            stop.at_once = False
        accuracy = processes.from_main(values.get("preview_accuracy"))
        if accuracy is not None:
            shown["preview"] = f"{accuracy:.3f}"
            if config.keep_best and accuracy > best:
                best = accuracy
                save("best.pth")
        log(values | {"picture": name})
        owed, since, timed_from = False, time.perf_counter(), state.step

    with (
        lock,
        StopSignal() as stop,
        tqdm(
            total=total_steps, initial=state.step, desc="train", unit="step",
            disable=not processes.is_main(),
        ) as bar,
    ):  # fmt: skip
        if owed and not stop.agreed():
            draw_preview()
        while state.step < total_steps and not stop.agreed():
            epoch, batch = divmod(state.step, steps_per_epoch)
            loader.batch_sampler.set_position(epoch, batch)
            state.model.train()
            for x_0, labels in loader:
                x_0 = x_0.to(device, memory_format=torch.channels_last, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                lr = state.lr_scheduler.get_last_lr()[0]
                loss, grad_norm = train_step(
                    state, config, scheduler, x_0, labels, dtype, batch_size
                )
                losses.append(loss)
                bar.update()
                if state.step % config.log_interval == 0 or state.step == total_steps:
                    skipped = check_skipped(config.max_skipped_steps)
                    of_steps = whole_batch(losses).tolist()
                    finite = [value for value in of_steps if math.isfinite(value)]
                    loss = sum(finite) / len(finite) if finite else None
                    seconds = time.perf_counter() - since
                    images_per_s = (state.step - timed_from) * batch_size / seconds
                    values = {"loss": loss, "lr": lr, "grad_norm": grad_norm.item(),
                              "images_per_s": images_per_s, "seconds": seconds,
                              "skipped_steps": skipped}  # fmt: skip
                    if device.type == "cuda":
                        values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
                    log({k: v for k, v in values.items() if v is not None and math.isfinite(v)})
                    shown |= {"loss": f"{loss:.4f}" if finite else "NaN", "lr": f"{lr:.1e}",
                              "img/s": f"{images_per_s:.0f}"}  # fmt: skip
                    if skipped:
                        shown["skipped"] = str(skipped)
                    bar.set_postfix(shown)
                    losses = []
                    since, timed_from = time.perf_counter(), state.step
                if stop.agreed() or state.step == total_steps:
                    break
            done = state.step == total_steps
            epoch = math.ceil(state.step / steps_per_epoch)
            save_due = save_due or epoch % config.save_interval == 0
            # While the network gives NaN, that waits: the last good checkpoint stays the last.
            if stop.agreed() or done or (save_due and not state.skipped[1]):
                saved, saved_step, save_due = save(), state.step, False
            owed = preview_due()
            if owed and not stop.agreed():
                draw_preview()
        if state.step != saved_step:  # stopped while a preview was drawn
            saved = save()
    tracker.finish()
    if stop.number is not None and (state.step < total_steps or owed):
        print(f"stopped at step {state.step}, saved {saved}; go on with the same command and "
              "--resume auto", file=sys.stderr)  # fmt: skip
        sys.exit(128 + stop.number)
    print(f"saved {saved}")
    return saved


if __name__ == "__main__":
    run(main)
