"""How much noise at which timestep, and which timesteps a sampler visits."""

import functools
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from runtime.settings import SamplerConfig, SchedulerConfig, UserError

# Scheduler and what it takes beside the schedule; clip_sample=False as in the original.
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
}


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


class StepsError(UserError):
    """A number of steps that a sampler can't take; `nearest` is one that it can."""

    def __init__(self, message: str, nearest: int):
        super().__init__(f"{message}; the nearest that works is {nearest}")
        self.nearest = nearest


def check_steps(
    noise: SchedulerConfig, config: SamplerConfig, flag: str = "--num_inference_steps"
) -> int:
    """Denoising steps of a sampling run: those asked for, if they make sense, or the default.

    The default is all T trained steps for ddpm, about 50 for ddim and about 12 for the solvers.

    Raises:
        StepsError: a number at which diffusers' timesteps step unevenly or begin far from noise.
        UserError: more steps than were trained; eta or resample with a scheduler that has no such
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
    raise StepsError(f"{flag} {steps}: {reason}", next(possible))
