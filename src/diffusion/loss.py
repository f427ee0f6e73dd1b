"""The training loss, and what is drawn at random for it."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn


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
    interval: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random timesteps in [0, T), (count,), on the device of the generator.

    Args:
        power: t is T u^(1 / power), u uniform in [0, 1); 1 is uniform.
        interval: half of the timesteps are drawn from this part of [0, 1) alone, uniformly, the
            others by `power` from all of it; (0, 1): all are drawn so.
        stratified: one u in each of `count` equal parts of [0, 1), so that a batch sees all noise
            levels (in the spirit of Kingma et al. 2021, appendix I.1).
    """
    device = generator.device if generator else None
    u = torch.rand(count, device=device, generator=generator)
    if stratified:
        u = (torch.arange(count, device=device) + u) / count
    first, last = interval
    if interval == (0, 1):
        x = u ** (1 / power)
    else:
        inside, others = first + (last - first) * 2 * u, (2 * u - 1).clamp(min=0) ** (1 / power)
        x = torch.where(u < 0.5, inside, others)
    return (num_train_timesteps * x).long().clamp(max=num_train_timesteps - 1)


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
