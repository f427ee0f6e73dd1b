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
import functools
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import processes
from alignment import Alignment
from checkpoint import (
    Checkpoint,
    DamagedFileError,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from config import TrainConfig, UserError, run, to_dict
from dataset import (
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
    scale,
    training_loss,
)
from evaluator import Evaluator, load_evaluator
from files import (
    atomic_write,
    check_folder,
    lock_folder,
    make_folder,
    remove_left_overs,
    write_json,
)
from model import DiffusionModel, summary, zero_init
from optimizer import make_optimizer
from preview import Preview, preview_sampling
from resume import Source, checkpoints, latest_checkpoint, read_config
from stop_signal import Stopped, StopSignal
from tracking import Tracker


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
    alignment: Alignment | None
    skipped: Tensor
    """(2,) on the device: steps skipped for NaN or infinite gradients, in all and in a row."""
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """(), this process's part of each step's loss, since the last line of metrics.jsonl."""

    def training_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "alignment": self.alignment.state_dict() if self.alignment else None,
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
            if self.alignment is not None:
                self.alignment.load_state_dict(checkpoint.training["alignment"])
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
    images, labels, t, eps = x_0, labels * kept[mine], t[mine], eps[mine]
    x_0 = scale(images, config.noise)

    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    parts = config.gradient_accumulation_steps
    for number in range(parts):
        part = slice(len(x_0) * number // parts, len(x_0) * (number + 1) // parts)
        last = number == parts - 1  # processes exchange their gradients only then
        with contextlib.nullcontext() if last else no_sync(state.parallel):
            features = {} if state.alignment else None
            with autocast(device, dtype):
                losses = training_loss(
                    functools.partial(state.parallel, features=features), scheduler, x_0[part],
                    labels[part], t[part], eps[part], config.min_snr_gamma,
                )  # fmt: skip
                total += losses.detach().sum() / count
                if state.alignment:
                    losses = losses + config.align_weight * state.alignment(features, images[part])
            # Gradients become their mean over processes: the sum is wanted.
            state.scaler.scale(losses.sum() / count * processes.world_size()).backward()
    if state.alignment:
        state.alignment.share_gradients()

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


def data_key(dataset: IclevrDataset) -> str:
    """Hash of the training pictures' names and labels, to resume on the same ones only."""
    key = hashlib.sha256("\n".join(dataset.names).encode("utf-8", "surrogatepass"))
    key.update(dataset.labels.numpy().tobytes())
    return key.hexdigest()


def build_state(
    config: TrainConfig, total_steps: int, device: torch.device, teacher: Evaluator | None = None
) -> TrainState:
    """Network, average, optimiser and schedules before the first step.

    Args:
        teacher: whose features the network's are aligned to; None: of nobody.

    Raises:
        UserError: the network's features don't fit the teacher's.
    """
    torch.manual_seed(config.seed)
    model = DiffusionModel(config.model)
    if config.zero_init:
        zero_init(model)
    model = model.to(device, memory_format=torch.channels_last)
    alignment = Alignment(teacher, config.model).to(device) if teacher else None
    optimizer = make_optimizer(model, config, [*alignment.parameters()] if alignment else [])
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
        alignment,
        torch.zeros(2, device=device),
    )


class Metrics:
    """metrics.jsonl: a line of JSON for each record, {"step": ...}."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[tuple[float, str]]:
        """Each line with its step, which is infinite where a kill or a full disk cut it short."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        found = []
        for line in text.splitlines():
            try:
                found.append((json.loads(line)["step"], line))
            except (ValueError, TypeError, KeyError):
                found.append((math.inf, line))
        return found

    def has_preview(self, step: int) -> bool:
        """Whether there is a preview of the network after this step."""
        return any(at == step and '"picture"' in line for at, line in self.lines())

    def drop_after(self, step: int) -> None:
        """Take out the lines of later steps, which were lost and will be taken again."""
        if self.path.exists():
            kept = "".join(f"{line}\n" for at, line in self.lines() if at <= step)
            with atomic_write(self.path) as temporary:
                temporary.write_text(kept, encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: can't be written: {error.strerror}") from None


class NothingLeft(UserError):
    """A run that is to go on has taken all its steps."""


class Trainer:
    """A training from its first step, or a checkpoint, to its last: steps, files, previews.

    Of several processes all call the same methods in the same order, as these exchange data; the
    first one writes.

    Args:
        config: all settings.
        loader: batches of x_0 (n, 3, H, W) in [-1, 1] and labels (n, K), n being this process's
            share.
        objects: name -> index in the labels.
        preview: draws the test conditions.
        device: where the network trains.
        teacher: whose features the network's are aligned to.
    """

    def __init__(
        self,
        config: TrainConfig,
        loader: DataLoader,
        objects: dict[str, int],
        preview: Preview,
        device: torch.device,
        teacher: Evaluator | None = None,
    ):
        self.config, self.loader, self.objects, self.preview = config, loader, objects, preview
        self.device, self.dtype = device, autocast_dtype(config.mixed_precision, device)
        self.run_dir = config.run_dir
        self.metrics = Metrics(self.run_dir / "metrics.jsonl")
        self.data_key = data_key(loader.dataset)
        self.steps_per_epoch = len(loader)
        self.batch_size = loader.batch_sampler.batch_size
        self.total_steps = min(
            config.epochs * self.steps_per_epoch, config.max_train_steps or sys.maxsize
        )
        self.scheduler = make_scheduler(config.noise)
        self.state = build_state(config, self.total_steps, device, teacher)
        self.saved: Path | None = None
        """The last checkpoint."""
        self.saved_step = 0
        self.save_due = False
        self.stop = StopSignal()
        self.preview_owed = False
        """A preview is due and has not been drawn."""
        self.best = -1.0
        """The highest accuracy of a preview so far."""
        self.tracker: Tracker
        self.bar: tqdm
        self.shown: dict[str, str] = {}
        """What stands behind the progress bar."""
        self.restart_clock()

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return math.ceil(self.state.step / self.steps_per_epoch)

    @property
    def done(self) -> bool:
        return self.state.step >= self.total_steps

    def resume(self, source: Source) -> None:
        """Take over everything from a checkpoint of this run.

        Raises:
            UserError: it is of other pictures or not of this network.
            NothingLeft: all steps are done.
        """
        path, checkpoint = source
        known = (checkpoint.objects, checkpoint.training.get("data"))
        if known != (self.objects, self.data_key):
            raise UserError(
                f"{path}: was trained on other pictures than {self.loader.dataset.data_dir} holds "
                "now; name its --data_dir or start another --run_name"
            )
        self.state.load(checkpoint, path)
        if processes.from_main(self.state.step) != self.state.step:
            raise UserError(
                f"{path}: the first process goes on from another step; do all of them see "
                "the same --output_dir?"
            )
        if not processes.is_main():  # the parts of all processes add up to these
            self.state.losses = [torch.zeros_like(loss) for loss in self.state.losses]
        drawn = processes.from_main(self.metrics.has_preview(self.state.step))
        self.preview_owed = self.preview_due() and not drawn
        if self.done and not self.preview_owed:
            limited = self.total_steps == self.config.max_train_steps
            raise NothingLeft(
                f"{path}: all {self.state.step} steps are done; raise "
                f"{'--max_train_steps' if limited else '--epochs'} to go on"
            )
        self.saved, self.saved_step = path, self.state.step

    def train(self) -> Path:
        """Take the steps that are left; returns the last checkpoint.

        Ctrl-C and SIGTERM end it, after a checkpoint, with exit code 130 or 143.

        Raises:
            UserError: a file can't be written, or too many steps had to be skipped.
        """
        if processes.is_main():
            write_json(self.run_dir / "config.json", to_dict(self.config))
            self.metrics.drop_after(self.state.step)
            self.best = best_accuracy(self.run_dir)
        self.best = processes.from_main(self.best)
        state, config = self.state, self.config
        self.tracker = Tracker(
            config.wandb, config.wandb_project, config.run_name, self.run_dir, to_dict(config)
        )
        self.restart_clock()
        with (
            self.stop,
            tqdm(
                total=self.total_steps, initial=state.step, desc="train", unit="step",
                disable=not processes.is_main(),
            ) as self.bar,
        ):  # fmt: skip
            if self.preview_owed and not self.stop.agreed():
                self.draw_preview()
            while not self.done and not self.stop.agreed():
                self.train_epoch()
                self.save_due |= self.epoch % config.save_interval == 0
                # While the network gives NaN, that waits: the last good checkpoint stays the last.
                if self.stop.agreed() or self.done or (self.save_due and not state.skipped[1]):
                    self.save()
                self.preview_owed = self.preview_due()
                if self.preview_owed and not self.stop.agreed():
                    self.draw_preview()
            if state.step != self.saved_step:  # stopped while a preview was drawn
                self.save()
        self.tracker.finish()
        if self.stop.number is not None and (not self.done or self.preview_owed):
            print(
                f"stopped at step {state.step}, saved {self.saved}; go on with the same command "
                "and --resume auto", file=sys.stderr,
            )  # fmt: skip
            sys.exit(128 + self.stop.number)
        return self.saved

    def train_epoch(self) -> None:
        """Take the steps that are left of the epoch, fewer when told to stop or at the end."""
        config, state = self.config, self.state
        self.loader.batch_sampler.set_position(*divmod(state.step, self.steps_per_epoch))
        state.model.train()
        for x_0, labels in self.loader:
            x_0 = x_0.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            lr = state.lr_scheduler.get_last_lr()[0]
            loss, grad_norm = train_step(
                state, config, self.scheduler, x_0, labels, self.dtype, self.batch_size
            )
            state.losses.append(loss)
            self.bar.update()
            if state.step % config.log_interval == 0 or self.done:
                self.log_losses(lr, grad_norm)
            if self.stop.agreed() or self.done:
                break

    def log_losses(self, lr: float, grad_norm: Tensor) -> None:
        """Log the steps since the last line; of the steps, only this waits for the device."""
        skipped = self.check_skipped(self.config.max_skipped_steps)
        finite = [loss for loss in self.whole_losses().tolist() if math.isfinite(loss)]
        loss = sum(finite) / len(finite) if finite else math.nan
        seconds = time.perf_counter() - self.since
        images_per_s = (self.state.step - self.timed_from) * self.batch_size / seconds
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm.item(),
                  "images_per_s": images_per_s, "seconds": seconds,
                  "skipped_steps": skipped}  # fmt: skip
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.log({name: value for name, value in values.items() if math.isfinite(value)})
        self.shown |= {"loss": f"{loss:.4f}", "lr": f"{lr:.1e}", "img/s": f"{images_per_s:.0f}"}
        if skipped:
            self.shown["skipped"] = str(skipped)
        self.bar.set_postfix(self.shown)
        self.state.losses = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time steps from here on, without the preview or whatever came before."""
        self.since, self.timed_from = time.perf_counter(), self.state.step

    def whole_losses(self) -> Tensor:
        """(steps,) of the whole batch, of which every process knows its part."""
        losses = self.state.losses
        return processes.total(torch.stack(losses)) if losses else torch.zeros(0)

    def log(self, values: dict[str, Any]) -> None:
        """To Weights & Biases; numbers and text to metrics.jsonl, too."""
        if processes.is_main():
            state = self.state
            self.tracker.log(values, state.step)
            kept = {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
            self.metrics.write(
                {"step": state.step, "epoch": state.step / self.steps_per_epoch} | kept
            )

    def check_skipped(self, limit: int) -> int:
        """How many steps were skipped so far.

        Raises:
            UserError: the last `limit` of them were.
        """
        total, in_a_row = map(int, self.state.skipped.tolist())  # waits for the device
        if in_a_row >= limit:
            raise UserError(
                f"the last {in_a_row} steps before step {self.state.step} had NaN or infinite "
                "gradients and were skipped: start another --run_name with a lower --lr, or bf16 "
                f"instead of fp16; last checkpoint: {self.saved or 'none'}"
            )
        return total

    def save(self) -> None:
        """Write the epoch's checkpoint, and delete those that --keep_last has no room for."""
        # A few skipped steps harm nothing; but no run ends well with a network that gives NaN.
        limit = self.config.max_skipped_steps
        self.check_skipped(min(limit, 10) if self.done else limit)
        path = self.run_dir / "checkpoints" / f"model_epoch_{self.epoch}.pth"
        self.write_checkpoint(path)
        self.saved, self.saved_step, self.save_due = path, self.state.step, False
        if self.config.keep_last and processes.is_main() and not self.state.skipped[1]:
            # Those up to this one: later ones are damaged, and will be written again.
            known = checkpoints(self.run_dir)
            until = known.index(path) + 1 if path in known else 0
            for old in known[:until][: -self.config.keep_last]:
                old.unlink()

    def write_checkpoint(self, path: Path) -> None:
        """Write everything that `resume` takes over."""
        losses = self.whole_losses()  # of all processes
        if not processes.is_main():
            return
        state = self.state
        save_checkpoint(
            path,
            Checkpoint(
                replace(self.config, resume=None),
                self.objects,
                state.model.state_dict(),
                state.ema.state_dict() if state.ema else None,
                state.step // self.steps_per_epoch,
                state.step,
                state.training_state()
                | {"data": self.data_key, "losses": list(losses), "best": self.best},
            ),
        )

    def preview_due(self) -> bool:
        """Whether a preview belongs to the current step."""
        epoch, batches = divmod(self.state.step, self.steps_per_epoch)
        whole = batches == 0 and epoch > 0
        last = self.state.step == self.total_steps
        return last or (whole and epoch % self.config.sample_interval == 0)

    def draw_preview(self) -> None:
        """Draw the test conditions; if a signal cuts it short, it is owed when the run goes on."""
        name = f"samples/epoch_{self.epoch}.png"
        try:
            self.stop.at_once = True
            values = self.preview(self.state.ema or self.state.model, self.run_dir / name)
        except Stopped:
            return
        finally:
            self.stop.at_once = False
        accuracy = processes.from_main(values.get("preview_accuracy"))
        if accuracy is not None:
            self.shown["preview"] = f"{accuracy:.3f}"
            if self.config.keep_best and accuracy > self.best:
                self.best = accuracy
                self.write_checkpoint(self.run_dir / "checkpoints" / "best.pth")
        self.log(values | {"picture": name})
        self.preview_owed = False
        self.restart_clock()


def best_accuracy(run_dir: Path) -> float:
    """Of the preview that best.pth was kept for; -1 if there is none."""
    path = run_dir / "checkpoints" / "best.pth"
    if not path.exists():
        return -1.0
    try:
        best = load_checkpoint(path).training.get("best")
    except DamagedFileError as error:
        print(f"warning: {error.what}; the next best replaces it", file=sys.stderr)
        best = None
    return best if isinstance(best, float) else -1.0


@contextlib.contextmanager
def own_folder(run_dir: Path, latest: Path | None) -> Iterator[None]:
    """Keep other trainings out of a run's folder, and tidy up what an interrupted one has left.

    Args:
        latest: its latest checkpoint as far as this process knows.

    Raises:
        UserError: another process works there, or has since `latest` was found.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_main():
            stack.callback(lock_folder(run_dir, "choose another --run_name").release)
            if latest_checkpoint(run_dir) != latest:
                raise UserError(
                    f"{run_dir}: another process has trained here since this one started; "
                    "start again"
                )
            for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples"):
                remove_left_overs(folder)
        processes.wait_for_all()
        yield


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
