"""One optimiser step, and all that it changes."""

import contextlib
import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.loss import draw_timesteps, drop_labels, training_loss
from diffusion.schedule import scale
from judging.evaluator import Evaluator
from network.checkpoint import Checkpoint, load_weights
from network.model import DiffusionModel, zero_init
from runtime import processes
from runtime.device import autocast, autocast_dtype
from runtime.seeds import derive_seed
from runtime.settings import TrainConfig, UserError
from training.alignment import Alignment
from training.noise_levels import NoiseLevels
from training.optimizer import make_optimizer, warmup_then_cosine
from training.reward import Reward


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
    reward: Reward | None
    levels: NoiseLevels | None
    skipped: Tensor
    """(2,) on the device: steps skipped for NaN or infinite gradients, in all and in a row."""
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """(), this process's part of each step's loss, since the last line of metrics.jsonl."""

    def unshared(self) -> contextlib.AbstractContextManager:
        """Gradients of a backward pass in here stay in their process until a later one is out."""
        return contextlib.nullcontext() if self.parallel is self.model else self.parallel.no_sync()

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint keeps for `load`, beside weights, step and losses."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "alignment": self.alignment.state_dict() if self.alignment else None,
            "reward": self.reward.state_dict() if self.reward else None,
            "levels": self.levels.state_dict() if self.levels else None,
        }

    def load(self, checkpoint: Checkpoint, path: Path) -> tuple[float, float]:
        """Take over what a checkpoint holds.

        Returns:
            the learning rate that its next step would have had, and the one that it gets: another
            if the training has become longer or shorter.

        Raises:
            UserError: it is not of this network and optimiser.
        """
        load_weights(self.model, checkpoint.model, path, "its settings")
        if self.ema is not None:
            load_weights(self.ema, checkpoint.ema, path, "its settings")
        stored = checkpoint.training
        try:
            self.optimizer.load_state_dict(stored["optimizer"])
            self.lr_scheduler.load_state_dict(stored["lr_scheduler"])
            if stored["scaler"]:  # empty but for float16
                self.scaler.load_state_dict(stored["scaler"])
            if self.alignment is not None:
                self.alignment.load_state_dict(stored["alignment"])
            if self.reward is not None:
                self.reward.load_state_dict(stored["reward"])
            if self.levels is not None:
                self.levels.load_state_dict(stored["levels"])
            self.skipped.copy_(stored.get("skipped", self.skipped))
            self.losses = [loss.to(self.skipped.device) for loss in stored.get("losses", [])]
        except Exception as error:  # whatever the loaders make of a stranger's content
            why = " ".join(str(error).split())[:100]
            raise UserError(
                f"{path}: what it holds of the optimiser doesn't fit ({type(error).__name__}: "
                f"{why}); resume from another checkpoint"
            ) from None
        self.step = checkpoint.step
        # What was stored is of the old schedule, which may have come to its end: lr 0.
        (before, *_), rates = self.lr_scheduler.get_last_lr(), self.lr_scheduler
        rates._last_lr = [
            base * factor(rates.last_epoch)
            for base, factor in zip(rates.base_lrs, rates.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, rates.get_last_lr(), strict=True):
            group["lr"] = lr
        return before, rates.get_last_lr()[0]


def build_state(
    config: TrainConfig,
    total_steps: int,
    device: torch.device,
    teacher: Evaluator | None = None,
    reward_model: Evaluator | None = None,
) -> TrainState:
    """Network, average, optimiser and schedules before the first step.

    Args:
        teacher: whose features the network's are aligned to; None: of nobody.
        reward_model: whose opinion of its drawings it learns from; None: nobody's.

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
        warmup_then_cosine(optimizer, config.lr_warmup_steps, total_steps),
        torch.amp.GradScaler(
            device.type, enabled=autocast_dtype(config.mixed_precision, device) == torch.float16
        ),
        alignment,
        Reward(reward_model, config, device) if reward_model else None,
        NoiseLevels(config.noise.num_train_timesteps).to(device) if config.equal_levels else None,
        torch.zeros(2, device=device),
    )


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


def draw_randomness(
    config: TrainConfig, step: int, count: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What is random in a step, of the whole batch: t (count,), eps (count, 3, H, W) such as
    `like`, and which conditions are kept (count, 1), 1 or 0."""
    generator = step_generator(config.seed, step, like.device)
    t = draw_timesteps(
        count, config.noise.num_train_timesteps, config.timestep_power,
        config.stratified_timesteps, config.timestep_interval, generator,
    )  # fmt: skip
    eps = torch.randn(count, *like.shape[1:], device=like.device, generator=generator)
    all_kept = torch.ones(count, 1, device=like.device)
    return t, eps, drop_labels(all_kept, config.cfg_dropout_prob, generator)


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
    t, eps, kept = draw_randomness(config, state.step, count, x_0)
    mine = processes.shard(count)
    asked = processes.gather(labels.cpu(), count) if state.reward else None  # of all processes
    images, labels, t, eps = x_0, labels * kept[mine], t[mine], eps[mine]
    x_0 = scale(images, config.noise)

    state.optimizer.zero_grad(set_to_none=True)
    if state.reward:
        learn_from_reward(state, config, asked, dtype)
    found = []
    parts = config.gradient_accumulation_steps
    for number in range(parts):
        part = slice(len(x_0) * number // parts, len(x_0) * (number + 1) // parts)
        # Processes exchange their gradients with the last part only.
        exchange = number == parts - 1
        with contextlib.nullcontext() if exchange else state.unshared():
            model, features = state.parallel, {}
            if state.alignment:
                model = functools.partial(model, features=features)
            with autocast(device, dtype):
                losses = training_loss(
                    model, scheduler, x_0[part], labels[part], t[part], eps[part],
                    config.min_snr_gamma,
                )  # fmt: skip
                found.append(losses.detach())
                if state.levels:
                    losses = losses * state.levels.weights(t[part])
                if state.alignment:
                    losses = losses + config.align_weight * state.alignment(features, images[part])
            # Gradients become their mean over processes: the sum is wanted.
            state.scaler.scale(losses.sum() / count * processes.world_size()).backward()
    if state.alignment:
        state.alignment.share_gradients()
    losses = torch.cat(found)
    if state.levels:
        state.levels.update(t, losses)
    return losses.sum() / count, update_weights(state, config)


def learn_from_reward(
    state: TrainState, config: TrainConfig, labels: Tensor, dtype: torch.dtype | None
) -> None:
    """Add the gradient of the reward model's part of the loss: (n, K) labels, of all processes."""
    with state.unshared():
        loss = state.reward.loss(state.parallel, labels, state.step, dtype)
        if loss.requires_grad:  # in the first steps no picture may have begun
            weight = config.reward.reward_weight * processes.world_size()
            state.scaler.scale(weight * loss).backward()


def update_weights(state: TrainState, config: TrainConfig) -> Tensor:
    """Move the weights and their average by the gradients; returns the gradients' norm.

    NaN or infinite gradients change no weight; everything stays on the device, so that nothing
    waits for it.
    """
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm)
    bad = ~grad_norm.isfinite()
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
    return grad_norm
