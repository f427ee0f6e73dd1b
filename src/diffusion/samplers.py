"""Which samplers there are, and which numbers of steps they can take."""

from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from diffusion.schedule import shifted_betas
from runtime.settings import SamplerConfig, SchedulerConfig, UserError

# Scheduler and what it takes beside the schedule; clip_sample=False as in the original. By name, as
# diffusers loads each when it is asked for, and some take seconds.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
}


def make_scheduler(config: SchedulerConfig, name: str = "ddpm") -> SchedulerMixin:
    """diffusers' scheduler `name` with the schedule the network was trained with."""
    scheduler, extra = SCHEDULERS[name]
    if config.log_snr_shift:
        extra = extra | {"trained_betas": shifted_betas(config)}
    return getattr(diffusers, scheduler)(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        **extra,
    )


def alpha_bar_after(scheduler: Any, t: Tensor) -> Tensor:
    """alphas_cumprod at the end of the step from `t`; 1 after the last one, whose end is x_0."""
    later = scheduler.timesteps[scheduler.timesteps < t]
    return scheduler.alphas_cumprod[later[0]] if len(later) else torch.tensor(1.0)


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
