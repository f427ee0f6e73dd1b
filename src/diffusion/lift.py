"""Which of several pictures shows what was asked for? The network's own opinion, no judge's.

A network that draws pictures can also weigh them: where an object is in the picture, the condition
that names it explains the picture's noise better than the same condition without it. CompLift
(Yu & Gao 2025, arXiv 2505.13740) compares each part's own condition with none; here, as "red
sphere" alone means a scene of one object, each object is left out of the whole condition. The one
that is missed least counts, as a picture with one object wrong is wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.loss import training_loss
from diffusion.samplers import make_scheduler
from runtime.device import autocast, autocast_dtype
from runtime.seeds import draw_noise
from runtime.settings import Precision, SchedulerConfig

NUM_NOISES = 6
"""Noises that a picture is weighed with, evenly spread over LEVELS."""
LEVELS = (0.3, 0.7)
"""Noise levels t / T at which colors and shapes of a scene are settled."""


def left_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every condition without each of its objects: (N, K) -> (M, K), and its row in labels (M,)."""
    rows, objects = (labels > 0).nonzero(as_tuple=True)
    without = labels[rows].clone()
    without.scatter_(1, objects[:, None], 0)
    return without, rows


def lift_evaluations(labels: Tensor) -> float:
    """Evaluations of the network to weigh one picture, the mean over conditions (N, K)."""
    return NUM_NOISES * (1 + (labels > 0).sum().item() / len(labels))


@torch.no_grad()
def lift(
    model: nn.Module,
    noise: SchedulerConfig,
    x_0: Tensor,
    labels: Tensor,
    generators: Sequence[torch.Generator],
    precision: Precision,
) -> Tensor:
    """How much each picture needs the object that it needs least.

    min over objects i of E |v - v_theta(x_t, y without i)|^2 - |v - v_theta(x_t, y)|^2, with the
    same noise in both terms; v, eps or x_0 as the network predicts.

    Args:
        x_0: (N, 3, S, S) pictures as the network sees them, see `scale`.
        labels: (N, K) multi-hot, on the same device.
        generators: N on the CPU, one for each picture.

    Returns:
        (N,) float32 on the CPU; the higher, the better the picture shows its condition.
    """
    device, scheduler = x_0.device, make_scheduler(noise)
    dtype = autocast_dtype(precision, device)
    without, rows = left_out(labels)
    total = torch.zeros(len(rows), device=device)
    levels = torch.linspace(*LEVELS, NUM_NOISES) * (noise.num_train_timesteps - 1)
    for level in levels.long():
        t = level.to(device).expand(len(x_0))
        eps = draw_noise(generators, x_0.shape[3]).to(device)
        with autocast(device, dtype):
            whole = training_loss(model, scheduler, x_0, labels, t, eps)
            part = training_loss(model, scheduler, x_0[rows], without, t[rows], eps[rows])
        total += part - whole[rows]
    least = torch.full((len(x_0),), torch.inf, device=device)
    return least.scatter_reduce(0, rows, total / NUM_NOISES, "amin").cpu()
