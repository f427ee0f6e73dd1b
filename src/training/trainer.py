"""A training from its first step, or a checkpoint, to its last."""

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion.schedule import make_scheduler
from iclevr.dataset import (
    IclevrDataset,
)
from judging.evaluator import Evaluator
from network.checkpoint import (
    Checkpoint,
    DamagedFileError,
    load_checkpoint,
    save_checkpoint,
)
from runtime import processes
from runtime.device import autocast_dtype
from runtime.files import (
    lock_folder,
    remove_left_overs,
    write_json,
)
from runtime.settings import TrainConfig, UserError, to_dict
from runtime.tracking import Tracker
from training.history import Metrics
from training.preview import Preview
from training.resume import Source, checkpoints, latest_checkpoint
from training.step import build_state, train_step
from training.stop_signal import Stopped, StopSignal


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


def data_key(dataset: IclevrDataset) -> str:
    """Hash of the training pictures' names and labels, to resume on the same ones only."""
    key = hashlib.sha256("\n".join(dataset.names).encode("utf-8", "surrogatepass"))
    key.update(dataset.labels.numpy().tobytes())
    return key.hexdigest()


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
