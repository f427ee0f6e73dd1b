"""From noise to pictures: the one `sample`. Which samplers there are is in samplers.py."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.guidance import (
    Guide,
    classifier_guidance,
    guided_evaluations,
    guided_prediction,
    step_guidance,
)
from diffusion.lift import lift, lift_evaluations
from diffusion.samplers import alpha_bar_after, check_steps, make_scheduler
from diffusion.schedule import scale, unscale
from runtime import processes
from runtime.device import autocast, autocast_dtype
from runtime.output import progress_bar
from runtime.seeds import derive_seed, draw_noise
from runtime.settings import SamplerConfig, SamplingConfig, SchedulerConfig, UserError

T, U, V = TypeVar("T"), TypeVar("U"), TypeVar("V")


@dataclass(frozen=True)
class Inpainting:
    """Only a part of each picture is drawn, the rest is held to a picture that is there already."""

    x_0: Tensor
    """(N, 3, S, S) pictures as the network sees them, see `scale`."""
    free: Tensor
    """(N, 1, S, S) in [0, 1]: 1 where the picture is drawn, 0 where it is held."""

    def rows(self, which: Any) -> "Inpainting":
        """That of some of the pictures."""
        return Inpainting(self.x_0[which], self.free[which])

    def hold(self, x_t: Tensor, alpha_bar: Tensor, z: Tensor) -> Tensor:
        """x_t with all that is not free noised from x_0 (Lugmayr et al. 2022, algorithm 1, line 5).

        Args:
            alpha_bar: alphas_cumprod at the noise level of x_t; 1 for pictures without noise.
            z: (N, 3, S, S) standard normal noise.
        """
        alpha_bar, free = alpha_bar.to(x_t.device), self.free.to(x_t.device)
        around = alpha_bar.sqrt() * self.x_0.to(x_t.device) + (1 - alpha_bar).sqrt() * z
        return free * x_t + (1 - free) * around


def step_repeats(noise: SchedulerConfig, config: SamplerConfig, t: Tensor | int) -> int:
    """How many times the step from timestep `t` is taken, see `renoise`."""
    first, last = config.resample_interval
    return config.resample if first <= t / noise.num_train_timesteps <= last else 1


def renoise(x_prev: Tensor, t: Tensor, scheduler: Any, z: Tensor) -> Tensor:
    """Go back from the end of a step to its start: a draw from q(x_t | x_prev).

    sqrt(a) x_prev + sqrt(1 - a) z with a = alphas_cumprod_t / alphas_cumprod_prev. Taking the
    step again then lets the network mend what does not fit what it has meanwhile drawn elsewhere
    (RePaint, Lugmayr et al. 2022, algorithm 1, line 9).

    Args:
        x_prev: (N, 3, H, W), what the step of `scheduler` from `t` gave.
        z: (N, 3, H, W) standard normal noise.
    """
    a = scheduler.alphas_cumprod[t] / alpha_bar_after(scheduler, t)
    return a.sqrt().to(x_prev.device) * x_prev + (1 - a).sqrt().to(x_prev.device) * z


def evaluations(noise: SchedulerConfig, config: SamplingConfig, labels: Tensor) -> float:
    """Evaluations of the network for one picture, the mean over conditions (N, K).

    A guided step takes two, composed ones more; of several pictures that are drawn and weighed
    all count.
    """
    scheduler = make_scheduler(noise, config.scheduler)
    scheduler.set_timesteps(check_steps(noise, config))
    drawing = sum(
        step_repeats(noise, config, t)
        * guided_evaluations(labels, step_guidance(noise, config, t), config.compose)
        for t in scheduler.timesteps
    )
    return drawing if config.best_of == 1 else config.best_of * (drawing + lift_evaluations(labels))


@torch.no_grad()
def denoise(
    model: nn.Module,
    noise: SchedulerConfig,
    labels: Tensor,
    generators: Sequence[torch.Generator],
    config: SamplingConfig,
    guide: Guide | None = None,
    inpainting: Inpainting | None = None,
) -> Iterator[Tensor]:
    """Draw one batch: yields x_T, then x_t after every step, the last one being x_0.

    Args:
        labels: (N, K) on the network's device, -1 for objects that must not come.
        generators: N on the CPU, one for each picture.

    Yields:
        (N, 3, S, S) on the network's device, as the network sees pictures, see `scale`.
    """
    device = labels.device
    dtype = autocast_dtype(config.mixed_precision, device)
    scheduler = make_scheduler(noise, config.scheduler)
    scheduler.set_timesteps(check_steps(noise, config))
    extra = {  # the solvers draw nothing
        "ddpm": {"generator": generators},
        "ddim": {"generator": generators, "eta": config.eta},
    }.get(config.scheduler, {})
    x_t = draw_noise(generators, model.image_size).to(device)
    yield x_t
    for t in scheduler.timesteps:
        guidance_scale, repeats = step_guidance(noise, config, t), step_repeats(noise, config, t)
        for repeat in range(repeats):
            if repeat:
                z = draw_noise(generators, model.image_size).to(device)
                x_t = renoise(x_t, t, scheduler, z)
            with autocast(device, dtype):
                prediction = guided_prediction(
                    model, x_t, t.to(device), labels, guidance_scale, config.compose
                )
            if config.classifier_guidance_scale:
                prediction = classifier_guidance(
                    prediction, x_t, t, labels.clamp(min=0), scheduler, noise, guide,
                    config.classifier_guidance_scale,
                )  # fmt: skip
            x_t = scheduler.step(prediction, t, x_t, **extra).prev_sample
            if inpainting is not None:
                z = draw_noise(generators, model.image_size).to(device)
                x_t = inpainting.hold(x_t, alpha_bar_after(scheduler, t), z)
        yield x_t


def sample(
    model: nn.Module,
    noise: SchedulerConfig,
    labels: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig,
    num_intermediates: int = 0,
    progress: bool = True,
    guide: Guide | None = None,
    inpainting: Inpainting | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw pictures for conditions: from noise to x_0 with guidance.

    Every picture has its own random numbers, made on the CPU: it does not depend on the batch it
    is drawn in, nor on the device but for rounding. Of several processes each draws its share,
    and all get all pictures.

    Args:
        model: the network, on its device; put into eval mode.
        noise: the schedule the network was trained with.
        labels: (N, K) multi-hot conditions, -1 for objects that must not come.
        seeds: N seeds.
        config: scheduler, steps, guidance scale, batch size, number format.
        num_intermediates: pictures to keep on the way, evenly spaced, noise and result included;
            more than there are steps repeat some.
        progress: show a progress bar.
        guide: whose gradient is followed if config.classifier_guidance_scale is not 0.
        inpainting: draw only a part of each picture.

    Returns:
        pictures (N, 3, S, S) float32 in [-1, 1] on the CPU, and the kept x_t
        (num_intermediates, N, 3, S, S), clipped to [-1, 1] as well.
    """
    more = num_intermediates, progress, guide, inpainting
    steps = sample_steps(model, noise, labels, seeds, config, *more)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@torch.no_grad()
def sample_steps(
    model: nn.Module,
    noise: SchedulerConfig,
    labels: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig,
    num_intermediates: int = 0,
    progress: bool = True,
    guide: Guide | None = None,
    inpainting: Inpainting | None = None,
) -> Generator[Tensor, None, tuple[Tensor, Tensor]]:
    """As `sample`, one step at a time: whoever watches may show each, or go away.

    Yields:
        what `denoise` yields of one batch after the other. With config.best_of the pictures
        between which the choice is still to be made stand side by side.

    Returns:
        what `sample` returns.
    """
    if config.best_of > 1:
        more = num_intermediates, progress, guide
        return (yield from best_of(model, noise, labels, seeds, config, inpainting, *more))
    if config.classifier_guidance_scale and guide is None:
        raise ValueError("classifier_guidance_scale needs a guide")
    if len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels but {len(seeds)} seeds")
    model.eval()
    device, size = next(model.parameters()).device, model.image_size
    steps = check_steps(noise, config)
    kept_steps = np.linspace(0, steps, num_intermediates).round().astype(int).tolist()

    count, mine = len(seeds), processes.shard(len(seeds))
    labels, seeds = labels[mine], seeds[mine]
    inpainting = inpainting and inpainting.rows(mine)
    pictures = [torch.empty(0, 3, size, size)]  # of a process without a share
    intermediates = [torch.empty(num_intermediates, 0, 3, size, size)]
    starts = range(0, len(seeds), config.batch_size)
    with progress_bar(
        total=len(starts) * steps, shown=progress, desc="sample", unit="step", leave=False
    ) as bar:
        for start in starts:
            batch = slice(start, start + config.batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            y, kept = labels[batch].to(device), []
            part = inpainting and inpainting.rows(batch)
            for done, x_t in enumerate(denoise(model, noise, y, generators, config, guide, part)):
                kept += [x_t.cpu()] * kept_steps.count(done)
                bar.update(done > 0)
                yield x_t
            pictures.append(x_t.cpu())
            intermediates.append(torch.stack(kept) if kept else torch.empty(0, *x_t.shape))
    x_0 = processes.gather(torch.cat(pictures), count)
    kept_x_t = processes.gather(torch.cat(intermediates, dim=1).movedim(1, 0), count).movedim(0, 1)
    if not x_0.isfinite().all():
        raise UserError(
            "the network gives NaN or infinite values: its training has diverged; use an earlier "
            "checkpoint"
        )
    return unscale(x_0, noise).clamp(-1, 1), unscale(kept_x_t, noise).clamp(-1, 1)


def relay(steps: Generator[T, None, V], change: Callable[[T], U]) -> Generator[U, None, V]:
    """The same steps, each of them changed, and what they return in the end."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        yield change(step)


def best_of(
    model: nn.Module,
    noise: SchedulerConfig,
    labels: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig,
    inpainting: Inpainting | None,
    *more: Any,
) -> Generator[Tensor, None, tuple[Tensor, Tensor]]:
    """Draw `config.best_of` pictures of every condition and keep the one with the highest `lift`.

    The first of them is the picture that is drawn without a choice. Arguments, what is
    yielded and what is returned are those of `sample_steps`.
    """
    n = config.best_of
    seeds = [s if k == 0 else derive_seed(s, 4, k) for s in seeds for k in range(n)]
    repeated = labels.repeat_interleave(n, dim=0)
    one = replace(config, best_of=1)
    if inpainting is not None:
        inpainting = inpainting.rows(torch.arange(len(labels)).repeat_interleave(n))
    images, kept = yield from sample_steps(model, noise, repeated, seeds, one, *more, inpainting)
    device, mine = next(model.parameters()).device, processes.shard(len(seeds))
    lifts = [torch.empty(0)]  # of a process without a share
    for start in range(mine.start, mine.stop, config.batch_size):
        part = slice(start, min(start + config.batch_size, mine.stop))
        generators = [torch.Generator().manual_seed(derive_seed(s, 5, 0)) for s in seeds[part]]
        x_0 = scale(images[part].to(device), noise)
        y = repeated[part].clamp(min=0).to(device)
        lifts.append(lift(model, noise, x_0, y, generators, config.mixed_precision))
    scores = processes.gather(torch.cat(lifts), len(seeds)).view(-1, n)
    best = torch.arange(len(labels)) * n + scores.argmax(dim=1)
    return images[best], kept[:, best]
