"""How much noise at which timestep, and how pictures look to the network."""

import functools

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from runtime.settings import SchedulerConfig


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
