"""A training from its first step, or a checkpoint, to its last."""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion.samplers import make_scheduler
from iclevr.dataset import data_key
from judging.evaluator import Evaluator
from network.checkpoint import Checkpoint, load_weights, save_checkpoint
from network.model import widened
from runtime import processes
from runtime.device import autocast_dtype
from runtime.files import write_json
from runtime.output import progress_bar
from runtime.settings import TrainConfig, UserError, to_dict, with_paths
from runtime.signals import Stopped, StopSignal
from runtime.tracking import Tracker
from training.history import History
from training.preview import Preview
from training.run_folder import Source, best_accuracy, best_path, checkpoint_path, delete_older
from training.step import build_state, train_step


class Trainer:
    """The loop over steps, with its log, checkpoints and previews.

    Of several processes all call the same methods in the same order, as these exchange data; the
    first one writes.

    Args:
        loader: batches of x_0 (n, 3, H, W) in [-1, 1] and labels (n, K), n being this process's
            share.
        objects: name -> index in the labels.
        teacher: whose features the network's are aligned to.
        reward_model: whose opinion of its drawings it learns from.
    """

    def __init__(
        self,
        config: TrainConfig,
        loader: DataLoader,
        objects: dict[str, int],
        preview: Preview,
        device: torch.device,
        teacher: Evaluator | None = None,
        reward_model: Evaluator | None = None,
    ):
        self.config, self.loader, self.objects, self.preview = config, loader, objects, preview
        self.device, self.dtype = device, autocast_dtype(config.mixed_precision, device)
        self.run_dir = config.run_dir
        self.stored = with_paths(replace(config, resume=None), Path.absolute)
        """The settings as they are kept: whoever goes on may stand in another folder."""
        self.history = History(self.run_dir / "metrics.jsonl")
        self.data_key = data_key(loader.dataset)
        self.steps_per_epoch = len(loader)
        self.batch_size = loader.batch_sampler.batch_size
        self.total_steps = min(
            config.epochs * self.steps_per_epoch, config.max_train_steps or sys.maxsize
        )
        self.scheduler = make_scheduler(config.noise)
        self.state = build_state(config, self.total_steps, device, teacher, reward_model)
        self.saved: Path | None = None
        """The last checkpoint."""
        self.saved_step = self.previewed_step = 0
        """Steps done before the last checkpoint and the last preview."""
        self.best = -1.0
        """The highest accuracy of a preview so far, in the first process."""
        self.stop = StopSignal()
        self.tracker: Tracker
        self.bar: tqdm
        self.shown: dict[str, str] = {}
        """What stands behind the progress bar."""

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return math.ceil(self.state.step / self.steps_per_epoch)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.state.step >= self.total_steps

    @property
    def preview_owed(self) -> bool:
        """Whether a preview belongs to the current step and has not been drawn."""
        step = self.state.step
        regular = step % (self.config.sample_interval * self.steps_per_epoch) == 0
        return (regular or step == self.total_steps) and step != self.previewed_step

    @property
    def save_due(self) -> bool:
        """Whether --save_interval wants a checkpoint of an epoch since the last one."""
        steps = self.config.save_interval * self.steps_per_epoch
        # While the network gives NaN, that waits: the last good checkpoint stays the last.
        return self.state.step // steps > self.saved_step // steps and not self.state.skipped[1]

    def resume(self, source: Source) -> None:
        """Take over everything from a checkpoint of this run.

        Raises:
            UserError: it is of other pictures or not of this network.
        """
        path, checkpoint = source
        if (checkpoint.objects, checkpoint.training.get("data")) != (self.objects, self.data_key):
            raise UserError(
                f"{path}: was trained on other pictures than {self.loader.dataset.data_dir} holds "
                "now; name its --data_dir or start another --run_name"
            )
        before, lr = self.state.load(checkpoint, path)
        if abs(lr - before) > 0.01 * before and not self.done:
            print(
                f"warning: the learning rate goes from {before:.2g} to {lr:.2g}: its way down to 0 "
                f"now ends at step {self.total_steps}", file=sys.stderr,
            )  # fmt: skip
        if processes.from_main(self.state.step) != self.state.step:
            raise UserError(
                f"{path}: the first process goes on from another step; do all of them see "
                "the same --output_dir?"
            )
        if not processes.is_main():  # the parts of all processes add up to these
            self.state.losses = [torch.zeros_like(loss) for loss in self.state.losses]
        self.saved, self.saved_step = path, self.state.step
        if processes.from_main(self.history.has_preview(self.state.step)):
            self.previewed_step = self.state.step

    def start_from(self, source: Source) -> None:
        """Take over the averaged weights of another run; everything else starts afresh.

        Raises:
            UserError: it was trained for other objects, or its embeddings are wider.
        """
        path, checkpoint = source
        if checkpoint.objects != self.objects:
            raise UserError(f"--init_from {path}: was trained for other objects, or another order")
        weights = checkpoint.ema or checkpoint.model
        dim = self.config.model.time_embedding_dim
        if dim != checkpoint.config.model.time_embedding_dim:
            try:
                weights = widened(weights, self.state.model.state_dict())
            except ValueError as error:
                raise UserError(
                    f"--time_embedding_dim {dim}: {path} has wider ones ({error})"
                ) from None
        for model in filter(None, (self.state.model, self.state.ema)):
            load_weights(model, weights, path, "its settings")
        print(f"start: weights of {path}, recipe {self.config.recipe} for the training")

    def note_start(self, made_by: dict[str, Any]) -> None:
        """A line of metrics.jsonl for every start: its `provenance` and how far it is to go."""
        if processes.is_main():
            step = self.state.step
            about = {"total_steps": self.total_steps, "num_pictures": len(self.loader.dataset)}
            self.history.write(step, step / self.steps_per_epoch, made_by | about)

    def train(self) -> Path:
        """Take the steps that are left; returns the last checkpoint.

        Ctrl-C and SIGTERM end it, after a checkpoint, with exit code 130 or 143.

        Raises:
            UserError: a file can't be written, or too many steps had to be skipped.
        """
        config, state = self.config, self.state
        if processes.is_main():
            write_json(self.run_dir / "config.json", to_dict(self.stored))
            self.history.drop_after(state.step)
            self.best = best_accuracy(self.run_dir)
        self.tracker = Tracker(
            config.wandb, config.wandb_project, config.run_name, self.run_dir,
            to_dict(self.stored), fresh=not state.step,
        )  # fmt: skip
        self.bar = progress_bar(
            total=self.total_steps, initial=state.step, desc="train", unit="step"
        )
        with self.stop, self.bar:
            self.restart_clock()
            while True:
                if self.preview_owed and not self.stop.agreed():
                    self.draw_preview()
                if self.done or self.stop.agreed():
                    break
                self.train_epoch()
                if self.stop.agreed() or self.done or self.save_due:
                    self.save()
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
        losses = self.whole_losses().cpu().double()
        loss = losses[losses.isfinite()].mean().item()  # NaN if all were skipped
        seconds = time.perf_counter() - self.since
        images_per_s = (self.state.step - self.timed_from) * self.batch_size / seconds
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm.item(),
                  "images_per_s": images_per_s, "seconds": seconds,
                  "skipped_steps": skipped}  # fmt: skip
        if self.state.reward:
            values["reward_loss"] = processes.total(self.state.reward.last).item()
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.log({name: value for name, value in values.items() if math.isfinite(value)})
        self.shown |= {"loss": f"{loss:.4f}", "lr": f"{lr:.1e}", "img/s": f"{images_per_s:.0f}"}
        if skipped:
            self.shown["skipped"] = str(skipped)
        self.bar.set_postfix(self.shown, refresh=False)
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
            step = self.state.step
            self.tracker.log(values, step)
            self.history.write(step, step / self.steps_per_epoch, values)

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
        path = checkpoint_path(self.run_dir, self.epoch)
        self.write_checkpoint(path)
        self.saved, self.saved_step = path, self.state.step
        if self.config.keep_last and processes.is_main() and not self.state.skipped[1]:
            delete_older(path, self.config.keep_last)

    def write_checkpoint(self, path: Path) -> None:
        """Write everything that `resume` takes over."""
        state, losses = self.state, self.whole_losses()
        training = state.training_state()  # of all processes, as the losses are
        if not processes.is_main():
            return
        of_run = {"data": self.data_key, "losses": list(losses), "best": self.best}
        checkpoint = Checkpoint(
            config=self.stored,
            objects=self.objects,
            model=state.model.state_dict(),
            ema=state.ema.state_dict() if state.ema else None,
            epoch=state.step // self.steps_per_epoch,
            step=state.step,
            training=training | of_run,
        )
        save_checkpoint(path, checkpoint)

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
        accuracy = values.get("preview_accuracy", -1.0)  # of the first process, with a judge
        if accuracy >= 0:
            self.shown["preview"] = f"{accuracy:.3f}"
        if self.config.keep_best and processes.from_main(accuracy > self.best):
            self.best = accuracy
            self.write_checkpoint(best_path(self.run_dir))
        self.log(values | {"picture": name})
        self.previewed_step = self.state.step
        self.restart_clock()
