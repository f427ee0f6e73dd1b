"""Noise in, noise out: training loss, guidance and sampling over diffusers' schedulers.

Symbols as in DDPM (Ho et al. 2020): x_0 a picture, x_t the same after t steps of noise,
eps the noise, alphas_cumprod (alpha-bar) the share of signal left. Timesteps run from 0 to T - 1.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from tqdm import tqdm

from runtime import processes
from runtime.device import autocast, autocast_dtype
from runtime.settings import SamplerConfig, SamplingConfig, SchedulerConfig, UserError

# Scheduler and what it takes beside the schedule; clip_sample=False as in the original.
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
}


class Guide(Protocol):
    """What classifier guidance asks of a judge."""

    def log_likelihood(self, images: Tensor, labels: Tensor) -> Tensor:
        """log p(labels | images), (N,), with gradient, of (N, 3, H, W) in [-1, 1], (N, K)."""


def make_scheduler(config: SchedulerConfig, name: str = "ddpm") -> SchedulerMixin:
    """diffusers' scheduler `name` with the schedule the network was trained with."""
    scheduler, extra = SCHEDULERS[name]
    if config.log_snr_shift:
        extra = extra | {"trained_betas": shifted_betas(config)}
    return scheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        **extra,
    )


@functools.lru_cache
def shifted_betas(config: SchedulerConfig) -> list[float]:
    """Betas (T,) of the schedule whose log SNR is `log_snr_shift` above that of `beta_schedule`.

    SNR = alphas_cumprod / (1 - alphas_cumprod), so that its logarithm is the logit of
    alphas_cumprod (Hoogeboom et al. 2023, equation 4). Betas are at most .999, as diffusers' are.
    """
    plain = DDPMScheduler(config.num_train_timesteps, beta_schedule=config.beta_schedule)
    alphas_cumprod = (1 - plain.betas.double()).cumprod(0)
    shifted = (alphas_cumprod.logit() + config.log_snr_shift).sigmoid()
    before = torch.cat([torch.ones(1, dtype=torch.float64), shifted[:-1]])
    return (1 - shifted / before).clamp(max=0.999).tolist()


def scale(images: Tensor, config: SchedulerConfig) -> Tensor:
    """Pictures in [-1, 1] -> x_0 as the network sees it; `unscale` goes back.

    Like the scaling_factor of latent diffusion (Rombach et al. 2022, section 4.3.2): the pictures
    are pale (the stand-in's have a standard deviation of 0.10, i-CLEVR's about 0.14), so that
    unscaled most of the schedule drowns them.
    """
    return (images - config.shift_factor) * config.scaling_factor


def unscale(x_0: Tensor, config: SchedulerConfig) -> Tensor:
    """The inverse of `scale`."""
    return x_0 / config.scaling_factor + config.shift_factor


def drop_labels(labels: Tensor, prob: float, generator: torch.Generator | None = None) -> Tensor:
    """Set whole conditions to zero ("no condition"), each with chance `prob`: (N, K) -> (N, K).

    Classifier-free guidance trains both networks in one this way (Ho & Salimans 2022,
    algorithm 1); drawn for every picture by itself, not once for a batch.
    """
    keep = torch.rand(len(labels), 1, device=labels.device, generator=generator) >= prob
    return labels * keep


def draw_timesteps(
    count: int,
    num_train_timesteps: int,
    power: float = 1.0,
    stratified: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random timesteps in [0, T), (count,), on the device of the generator.

    Args:
        power: t is T u^(1 / power), u uniform in [0, 1); 1 is uniform.
        stratified: one u in each of `count` equal parts of [0, 1), so that a batch sees all noise
            levels (in the spirit of Kingma et al. 2021, appendix I.1).
    """
    device = generator.device if generator else None
    u = torch.rand(count, device=device, generator=generator)
    if stratified:
        u = (torch.arange(count, device=device) + u) / count
    return (num_train_timesteps * u ** (1 / power)).long().clamp(max=num_train_timesteps - 1)


def training_loss(
    model: nn.Module,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    labels: Tensor,
    t: Tensor,
    eps: Tensor,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """|target - model(x_t, t, y)|^2 of each picture (Ho et al. 2020, equation 14).

    Args:
        x_0:    (N, 3, H, W) pictures, see `scale`
        labels: (N, K) multi-hot conditions, see `drop_labels`
        t:      (N,) timesteps, see `draw_timesteps`
        eps:    (N, 3, H, W) standard normal noise
        min_snr_gamma: weight each picture by min(SNR, gamma) in terms of x_0 (Hang et al. 2023,
            section 3.4), rewritten for what the network predicts; None: weight 1.

    Returns:
        (N,) float32: means over pixels.
    """
    x_t = scheduler.add_noise(x_0, eps, t)
    prediction = model(x_t, t, labels).float()

    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = eps
    elif kind == "v_prediction":
        target = scheduler.get_velocity(x_0, eps, t)
    else:
        target = x_0
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        loss = loss * min_snr_weight(scheduler, t, min_snr_gamma)
    return loss


def min_snr_weight(scheduler: DDPMScheduler, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of the loss at `t` (Hang et al. 2023): (N,) -> (N,).

    The loss on x_0 with weight min(SNR, gamma) equals the loss on eps with that weight over SNR,
    and on v over SNR + 1, where SNR = alphas_cumprod / (1 - alphas_cumprod).
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(t.device)[t]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    per_x_0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / per_x_0[scheduler.config.prediction_type]


def guided_prediction(
    model: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor, guidance_scale: float
) -> Tensor:
    """Classifier-free guidance: eps_uncond + w (eps_cond - eps_uncond), the one place for it.

    w = 1 is the plain conditional network, w = 0 the unconditional one; for these two only one
    of both is run. (Ho & Salimans 2022, equation 6, call w - 1 what is w here.) For a network
    that predicts v or x_0 the same line guides eps as well: at a given x_t both are linear in it.

    Args:
        x_t:    (N, 3, H, W)
        t:      scalar timestep
        labels: (N, K) multi-hot

    Returns:
        (N, 3, H, W) float32, the guided prediction
    """
    if guidance_scale == 1:
        return model(x_t, t, labels).float()
    if guidance_scale == 0:
        return model(x_t, t, torch.zeros_like(labels)).float()
    both = model(torch.cat([x_t, x_t]), t, torch.cat([torch.zeros_like(labels), labels]))
    uncond, cond = both.float().chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def classifier_guidance(
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor,
    scheduler: Any,
    noise: SchedulerConfig,
    guide: Guide,
    classifier_guidance_scale: float,
) -> Tensor:
    """Follow the judge's gradient: eps - s alpha_t sigma_t grad log p(labels | x_0_hat).

    Classifier guidance (Dhariwal & Nichol 2021, algorithm 2) subtracts s sigma_t times the
    gradient with respect to x_t. A judge that knows no noise looks at x_0_hat instead, and the
    gradient is brought to x_t by d x_0_hat / d x_t = alpha_t, the value for pictures of unit
    variance (Song et al. 2023, PiGDM, equation 7): x_0_hat moves by s sigma_t^2 of its gradient.
    The network is not differentiated.

    Args:
        prediction, x_t: (N, 3, H, W); the prediction is eps, v or x_0, and so is the result.
        labels: (N, K) multi-hot.
    """
    alpha = scheduler.alphas_cumprod[t].to(x_t.device).sqrt()
    sigma = (1 - alpha**2).sqrt()
    kind = noise.prediction_type
    if kind == "epsilon":
        x_0 = (x_t - sigma * prediction) / alpha
    elif kind == "v_prediction":
        x_0 = alpha * x_t - sigma * prediction
    else:
        x_0 = prediction
    with torch.enable_grad():
        x_0 = x_0.detach().float().requires_grad_()
        likelihood = guide.log_likelihood(unscale(x_0, noise), labels)
        (gradient,) = torch.autograd.grad(likelihood.sum(), x_0)
    move = {"epsilon": -alpha * sigma, "v_prediction": -sigma, "sample": sigma**2}[kind]
    return prediction + classifier_guidance_scale * move * gradient


def check_steps(
    noise: SchedulerConfig, config: SamplerConfig, flag: str = "--num_inference_steps"
) -> int:
    """Denoising steps of a sampling run: those asked for, if they make sense, or the default.

    The default is all T trained steps for ddpm, about 50 for ddim and about 12 for the solvers.

    Raises:
        UserError: more steps than were trained; a number at which diffusers' timesteps step
            unevenly or begin far from noise; eta or resample with a scheduler that has no such
            thing.
    """
    name = config.scheduler
    if config.eta and name != "ddim":
        raise UserError(f"--eta {config.eta:g}: only --scheduler ddim knows it")
    if config.resample > 1 and name not in ("ddpm", "ddim"):
        raise UserError(
            f"--resample {config.resample}: {name} builds on its earlier steps and can't take one "
            "again; use --scheduler ddpm"
        )
    total = noise.num_train_timesteps
    scheduler = make_scheduler(noise, name)

    def why_not(steps: int) -> str | None:
        # DDPM and DDIM count in strides of T // n from 0 with "leading", and so does a DDIM step
        # whatever the spacing: with T = 500 and n = 300 sampling would begin at t = 299.
        strides = name == "ddim" or (name == "ddpm" and noise.timestep_spacing == "leading")
        if strides and total % steps:
            return f"does not divide the {total} trained timesteps"
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps or scheduler.timesteps.min() < 0:
            # "trailing" adds up 500 / 61 and, by rounding, comes past 0: t = -1.
            return f"diffusers' timesteps for it leave the {total} trained ones"
        first = int(scheduler.timesteps[0])
        if scheduler.alphas_cumprod[first] - scheduler.alphas_cumprod[-1] > 0.1:
            return f"sampling would begin at t = {first} of {total}, not in noise"
        return None

    steps = config.num_inference_steps
    if steps is None and name == "ddpm":
        return total
    wanted = steps or (50 if name == "ddim" else 12)
    if wanted > total and steps is not None:
        raise UserError(f"{flag} {steps}: the network knows {total} timesteps; use at most that")
    if wanted <= total and (reason := why_not(wanted)) is None:
        return wanted
    by_distance = sorted(range(1, total + 1), key=lambda n: abs(n - wanted))
    possible = (n for n in by_distance if why_not(n) is None)
    if steps is None:
        return next((n for n in possible if n >= 0.4 * wanted), total)
    near = next(possible)
    raise UserError(f"{flag} {steps}: {reason}; the nearest that works is {near}")


def step_repeats(noise: SchedulerConfig, config: SamplerConfig, t: Tensor | int) -> int:
    """How many times the step from timestep `t` is taken, see `renoise`."""
    first, last = config.resample_interval
    return config.resample if first <= t / noise.num_train_timesteps <= last else 1


def step_guidance(noise: SchedulerConfig, config: SamplingConfig, t: Tensor | int) -> float:
    """The guidance scale at timestep `t`."""
    first, last = config.guidance_interval
    return config.guidance_scale if first <= t / noise.num_train_timesteps <= last else 1.0


def renoise(x_prev: Tensor, t: Tensor, scheduler: Any, z: Tensor) -> Tensor:
    """Go back from the end of a step to its start: a draw from q(x_t | x_prev).

    sqrt(a) x_prev + sqrt(1 - a) z with a = alphas_cumprod_t / alphas_cumprod_prev. Taking the
    step again then lets the network mend what does not fit what it has meanwhile drawn elsewhere
    (RePaint, Lugmayr et al. 2022, algorithm 1, line 9).

    Args:
        x_prev: (N, 3, H, W), what the step of `scheduler` from `t` gave.
        z: (N, 3, H, W) standard normal noise.
    """
    if isinstance(scheduler, DDIMScheduler):
        previous = t - len(scheduler.alphas_cumprod) // scheduler.num_inference_steps
    else:
        previous = scheduler.previous_timestep(t)
    a = scheduler.alphas_cumprod[t]
    if previous >= 0:  # before the first step stands x_0, whose alphas_cumprod is 1
        a = a / scheduler.alphas_cumprod[previous]
    return a.sqrt().to(x_prev.device) * x_prev + (1 - a).sqrt().to(x_prev.device) * z


def draw_noise(generators: Sequence[torch.Generator], size: int) -> Tensor:
    """Standard normal (N, 3, S, S) on the CPU, from each picture's own generator."""
    return torch.cat([torch.randn(1, 3, size, size, generator=g) for g in generators])


def evaluations(noise: SchedulerConfig, config: SamplingConfig) -> int:
    """Evaluations of the network for one picture; a guided step takes two."""
    scheduler = make_scheduler(noise, config.scheduler)
    scheduler.set_timesteps(check_steps(noise, config))
    return sum(
        step_repeats(noise, config, t) * (1 if step_guidance(noise, config, t) in (0, 1) else 2)
        for t in scheduler.timesteps
    )


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: SchedulerConfig,
    labels: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig,
    num_intermediates: int = 0,
    progress: bool = True,
    guide: Guide | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw pictures for conditions: from noise to x_0 with guidance.

    Every picture has its own random numbers, made on the CPU: it does not depend on the batch it
    is drawn in, nor on the device but for rounding. Of several processes each draws its share,
    and all get all pictures.

    Args:
        model: the network, on its device; put into eval mode.
        noise: the schedule the network was trained with.
        labels: (N, K) multi-hot conditions.
        seeds: N seeds.
        config: scheduler, steps, guidance scale, batch size, number format.
        num_intermediates: pictures to keep on the way, evenly spaced, noise and result included;
            more than there are steps repeat some.
        progress: show a progress bar.
        guide: whose gradient is followed if config.classifier_guidance_scale is not 0.

    Returns:
        pictures (N, 3, S, S) float32 in [-1, 1] on the CPU, and the kept x_t
        (num_intermediates, N, 3, S, S), clipped to [-1, 1] as well.
    """
    if config.classifier_guidance_scale and guide is None:
        raise ValueError("classifier_guidance_scale needs a guide")
    if len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels but {len(seeds)} seeds")
    model.eval()
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.mixed_precision, device)
    size = model.image_size
    steps = check_steps(noise, config)
    scheduler = make_scheduler(noise, config.scheduler)
    kept_steps = np.linspace(0, steps, num_intermediates).round().astype(int).tolist()

    count, mine = len(seeds), processes.shard(len(seeds))
    labels, seeds = labels[mine], seeds[mine]
    pictures = [torch.empty(0, 3, size, size)]  # of a process without a share
    intermediates = [torch.empty(num_intermediates, 0, 3, size, size)]
    starts = range(0, len(seeds), config.batch_size)
    with tqdm(
        total=len(starts) * steps, desc="sample", unit="step", leave=False,
        disable=not progress or not processes.is_main(),
    ) as bar:  # fmt: skip
        for start in starts:
            batch = slice(start, start + config.batch_size)
            y = labels[batch].to(device)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            extra = {  # the solvers draw nothing
                "ddpm": {"generator": generators},
                "ddim": {"generator": generators, "eta": config.eta},
            }.get(config.scheduler, {})
            x_t = draw_noise(generators, size).to(device)
            scheduler.set_timesteps(steps)
            kept = [x_t.cpu()] * kept_steps.count(0)
            for done, t in enumerate(scheduler.timesteps, start=1):
                guidance_scale = step_guidance(noise, config, t)
                repeats = step_repeats(noise, config, t)
                for repeat in range(repeats):
                    with autocast(device, dtype):
                        prediction = guided_prediction(model, x_t, t.to(device), y, guidance_scale)
                    if config.classifier_guidance_scale:
                        prediction = classifier_guidance(
                            prediction, x_t, t, y, scheduler, noise, guide,
                            config.classifier_guidance_scale,
                        )  # fmt: skip
                    x_t = scheduler.step(prediction, t, x_t, **extra).prev_sample
                    if repeat < repeats - 1:
                        x_t = renoise(x_t, t, scheduler, draw_noise(generators, size).to(device))
                kept += [x_t.cpu()] * kept_steps.count(done)
                bar.update()
            pictures.append(x_t.cpu())
            intermediates.append(torch.stack(kept) if kept else torch.empty(0, *x_t.shape))
    x_0 = processes.gather(torch.cat(pictures), count)
    kept_x_t = processes.gather(torch.cat(intermediates, dim=1).movedim(1, 0), count).movedim(0, 1)
    if not x_0.isfinite().all():
        raise UserError("the network gives NaN or infinite values: its training has diverged")
    return unscale(x_0, noise).clamp(-1, 1), unscale(kept_x_t, noise).clamp(-1, 1)
