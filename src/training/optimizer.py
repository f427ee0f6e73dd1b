"""The optimiser: AdamW for all weights, or Muon for the matrices among them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from runtime.device import autocast_dtype
from runtime.settings import TrainConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan 2024), which brings singular values near 1."""
NOT_HIDDEN = ("unet.conv_in.", "unet.conv_out.", "class_embedding.0.")
"""Matrices between the network and the world, which Muon is not made for."""


def make_optimizer(
    model: nn.Module, config: TrainConfig, more: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) or `Muon`, with the settings' learning rate and decay.

    Args:
        more: weights outside the network, which AdamW trains in any case.
    """
    betas = (0.9, config.adam_beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            [*model.parameters(), *more], config.lr, betas, weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip
    hidden, others = [], [*more]
    for name, weight in model.named_parameters():
        is_hidden = weight.ndim > 1 and not name.startswith(NOT_HIDDEN)
        (hidden if is_hidden else others).append(weight)
    return Muon(hidden, others, config.lr, betas, config.weight_decay)


def warmup_then_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Learning rate: linearly up to the peak at step `warmup_steps`, then a cosine towards 0.

    It would be 0 before the first step and after the last, so that none is taken in vain.
    """

    def factor(step: int) -> float:  # steps from 0
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan 2024), for matrices; AdamW for the rest.

    A convolution's weight (C_out, C_in, k, k) counts as a matrix (C_out, C_in k k). Updates are
    scaled to the size of AdamW's (Liu et al. 2025, equation 4), so that both take one learning
    rate. Equal to torch.optim.Muon on matrices (which takes no convolutions), but works on all
    of one shape at once and, like torch's fused optimisers, leaves everything as it is where the
    attribute `found_inf` is 1.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        others: list[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": 0.95}
        super().__init__(groups, defaults)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch leaves the counts where they were read to, on the CPU.
        for weight, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(weight.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        matrices, others = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        self._adamw(others, found_inf)
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in matrices["params"]:
            if weight.grad is not None:
                by_shape.setdefault(weight.shape, []).append(weight)
        for weights in by_shape.values():
            self._muon(weights, matrices, found_inf)

    def _muon(self, weights: list[Tensor], group: dict, found_inf: Tensor | None) -> None:
        """One step of weights (C_out, C_in ...) of one shape."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [channels_last_view(self.state[weight]["momentum"]) for weight in weights]
        grad = torch.stack([channels_last_view(weight.grad) for weight in weights])
        lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
        before = torch.stack(momenta)
        momentum = torch.add(grad, before, alpha=mu)
        nesterov = grad.add_(momentum, alpha=mu).flatten(2)  # (weights, C_out, k k C_in)
        move = orthogonalized(nesterov).view_as(grad) * (0.2 * lr * max(nesterov.shape[1:]) ** 0.5)
        if found_inf is not None:
            bad = found_inf.bool()
            momentum = torch.where(bad, before, momentum)
            move = torch.where(bad, 0, move)
            decay = decay * ~bad
        torch._foreach_copy_(momenta, list(momentum))
        views = [channels_last_view(weight) for weight in weights]
        torch._foreach_mul_(views, 1 - lr * decay)
        torch._foreach_sub_(views, list(move))

    def _adamw(self, group: dict, found_inf: Tensor | None) -> None:
        weights = [w for w in group["params"] if w.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] |= {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        moments = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        adamw(
            weights, [weight.grad for weight in weights], *moments, [],
            [state["step"] for state in states], fused=True, found_inf=found_inf, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=1e-8, maximize=False,
        )  # fmt: skip


def channels_last_view(weight: Tensor) -> Tensor:
    """(C_out, C_in, k, k) -> (C_out, k, k, C_in), the order in memory of our convolutions.

    `orthogonalized` does not care for the order of columns, and copying in order is faster.
    """
    return weight.movedim(1, -1)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of each matrix U S V^T: (N, A, B) -> (N, A, B) float32.

    Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X; five leave singular values between
    about .7 and 1.2, near enough.
    """
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # On a CPU float32 is slower than bfloat16, and pays only where it saves most multiplications.
    by_gram = x.device.type == "cpu" and x.shape[2] > 4 * x.shape[1]
    x = newton_schulz_of_gram(x, steps) if by_gram else newton_schulz(x, steps)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """The iteration as it stands, for wide matrices (N, A, B), A <= B; bfloat16 if fast."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(autocast_dtype("auto", x.device) or torch.float32)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


def newton_schulz_of_gram(x: Tensor, steps: int) -> Tensor:
    """The same on X X^T alone, (N, A, A), for fewer multiplications; needs float32.

    A step is X <- P X with P = a I + b G + c G^2 and G = X X^T, and so G <- P G P: all are
    polynomials of the first G and commute. The product of all P meets X once, at the end.
    """
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.mT, None
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    return product @ x
