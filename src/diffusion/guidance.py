"""Guidance: by the network's own condition, or by a judge."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.schedule import unscale
from runtime.settings import Composition, SamplingConfig, SchedulerConfig


class Guide(Protocol):
    """What classifier guidance asks of a judge."""

    def log_likelihood(self, images: Tensor, labels: Tensor) -> Tensor:
        """log p(labels | images), (N,), with gradient, of (N, 3, H, W) in [-1, 1], (N, K)."""


UNWANTED_SHARE = 0.25
"""Weight of an object that must not come, as a share of the guidance scale: chosen on conditions
that are in neither split, where .5 lost twice as much of what was asked for."""


def conditions_of(
    labels: Tensor, guidance_scale: float, compose: Composition
) -> tuple[Tensor, Tensor, Tensor]:
    """What is added up for each picture: `guided_prediction`'s conditions c and weights w_c.

    joint   all objects asked for as one condition, weight w
    objects each of them as a condition of its own, weight w (Liu et al. 2022, equation 11)
    both    joint and objects, weight w / 2

    For an unwanted object u, -w' (eps_{asked and u} - eps_asked) is added, w' = w UNWANTED_SHARE:
    the score of p(u | x, asked)^-w'. (Equation 13 of Liu et al. takes p(u | x) for it. Of scenes,
    "purple cylinder" says that there is nothing else, and going away from that spoils the others.)

    Args:
        labels: (N, K), 1 for what is asked for, -1 for what must not come.

    Returns:
        conditions (M, K) multi-hot, the picture that each belongs to (M,), weights (M,)
    """
    asked, every = labels.clamp(min=0), torch.arange(len(labels), device=labels.device)
    share = {"joint": 1.0, "objects": 0.0, "both": 0.5}[compose]
    joint = torch.full_like(labels[:, 0], guidance_scale * share)
    if is_plain(labels, compose):
        return asked, every, joint

    with_unwanted, rows = one_each(labels < 0)
    with_unwanted += asked[rows]
    less = torch.full_like(joint[rows], guidance_scale * UNWANTED_SHARE)
    parts = [(asked, every, joint.index_add(0, rows, less)), (with_unwanted, rows, -less)]
    if compose != "joint":
        single, rows = one_each(asked > 0)
        weight = guidance_scale * (1 - share)
        parts.append((single, rows, torch.full_like(joint[rows], weight)))
    conditions, rows, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    heeded = weights != 0  # of single objects alone, the joint condition is only run if need be
    return conditions[heeded], rows[heeded], weights[heeded]


def one_each(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For every object that is chosen (N, K), a condition of it alone (M, K), and its row (M,)."""
    rows, objects = chosen.nonzero(as_tuple=True)
    return F.one_hot(objects, chosen.shape[1]).float(), rows


def guided_prediction(
    model: nn.Module,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor,
    guidance_scale: float,
    compose: Composition = "joint",
) -> Tensor:
    """Classifier-free guidance: eps_uncond + sum_c w_c (eps_c - eps_uncond), the one place for it.

    Mostly there is one condition c, all objects, with w_c = w: eps_uncond + w (eps_cond -
    eps_uncond). Then w = 1 is the plain conditional network, w = 0 the unconditional one; for
    these two only one of both is run. (Ho & Salimans 2022, equation 6, call w - 1 what is w here.)
    For more conditions see `conditions_of`. For a network that predicts v or x_0 the same line
    guides eps as well: at a given x_t both are linear in it.

    Args:
        x_t:    (N, 3, H, W)
        t:      scalar timestep, or (N,)
        labels: (N, K), 1 for each object asked for, -1 for each that must not come

    Returns:
        (N, 3, H, W) float32, the guided prediction
    """
    if guidance_scale == 0:
        return model(x_t, t, torch.zeros_like(labels)).float()
    if guidance_scale == 1 and is_plain(labels, compose):
        return model(x_t, t, labels).float()
    conditions, rows, weights = conditions_of(labels, guidance_scale, compose)
    y = torch.cat([torch.zeros_like(labels), conditions])
    t = t.expand(len(x_t))
    predictions = model(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), y).float()
    uncond, cond = predictions.split([len(x_t), len(rows)])
    return uncond.index_add(0, rows, weights[:, None, None, None] * (cond - uncond[rows]))


def step_guidance(noise: SchedulerConfig, config: SamplingConfig, t: Tensor | int) -> float:
    """The guidance scale at timestep `t`."""
    first, last = config.guidance_interval
    return config.guidance_scale if first <= t / noise.num_train_timesteps <= last else 1.0


def is_plain(labels: Tensor, compose: Composition) -> bool:
    """Whether the weights are those of one condition, with nothing unwanted."""
    return compose == "joint" and not (labels < 0).any()


def guided_evaluations(labels: Tensor, guidance_scale: float, compose: Composition) -> float:
    """Evaluations of the network in one `guided_prediction`, the mean over conditions (N, K)."""
    if guidance_scale == 0 or (guidance_scale == 1 and is_plain(labels, compose)):
        return 1
    return 1 + len(conditions_of(labels, guidance_scale, compose)[0]) / len(labels)


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
