"""How large the loss is at each noise level, to weight it by.

The loss on a picture that is nearly all noise is large whatever the network does, and its gradient
is mostly chance; that on little noise is large until details are learned, which decide nothing.
Between the two, where colors and shapes settle, it is smallest. Divided by its mean at the level,
each level counts the same: Karras et al. 2024 (EDM2, section 2.2) learn such weights, after
Kendall et al. 2018.
"""

import torch
from torch import Tensor, nn

from runtime import processes

LEVELS = 25
"""Equal parts of [0, T)."""
DECAY = 0.95
"""Of a running mean, for every picture of the level."""


class NoiseLevels(nn.Module):
    """Running means of the loss over timesteps in [0, T)."""

    def __init__(self, num_train_timesteps: int):
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        self.register_buffer("means", torch.zeros(LEVELS))
        """0: no picture of the level has been seen yet."""

    def levels(self, t: Tensor) -> Tensor:
        """(N,) timesteps -> (N,) in [0, LEVELS)."""
        return t * LEVELS // self.num_train_timesteps

    def weights(self, t: Tensor) -> Tensor:
        """(N,) timesteps -> (N,): the mean of all levels' means, divided by the level's own."""
        seen = self.means > 0
        mean = self.means.sum() / seen.sum().clamp(min=1)
        return torch.where(seen, mean / self.means, 1)[self.levels(t)]

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in a step's losses (n,) at timesteps (n,), of this process's pictures.

        The processes' means stay the same, but for rounding, as those of one process. Levels with
        a NaN or an infinite loss are left as they are.
        """
        levels = self.levels(t)
        sums = torch.zeros(2, LEVELS, device=losses.device)
        sums[0].index_add_(0, levels, losses.float())
        sums[1].index_add_(0, levels, torch.ones_like(losses, dtype=torch.float32))
        of_step, counts = processes.total(sums)
        decay = DECAY**counts * (self.means > 0)
        means = decay * self.means + (1 - decay) * of_step / counts
        self.means.copy_(torch.where(means.isfinite(), means, self.means))
