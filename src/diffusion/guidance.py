"""Guidance: by the network's own condition, or by a judge."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion.schedule import unscale
from runtime.settings import SchedulerConfig


class Guide(Protocol):
    """What classifier guidance asks of a judge."""

    def log_likelihood(self, images: Tensor, labels: Tensor) -> Tensor:
        """log p(labels | images), (N,), with gradient, of (N, 3, H, W) in [-1, 1], (N, K)."""


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
