"""How large the loss is at each noise level, to weight it by.

The loss on a picture that is nearly all noise is large whatever the network does, and its gradient
is mostly chance; if x_0 is predicted, it is many times that where colors and shapes settle, and
dozens of times that on little noise. Divided by its mean at the level, each level counts the same:
Karras et al. 2024 (EDM2) learn such weights, after Kendall et al. 2018.
"""

import torch
from torch import Tensor, nn

from runtime import processes

LEVELS = 25
"""Equal parts of [0, T)."""
DECAY = 0.95
"""Of a running mean, for every picture of the level: it is of the last 20 or so."""


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
        here = self.levels(t) == torch.arange(LEVELS, device=t.device)[:, None]  # (LEVELS, n)
        # A sum over rows, not index_add_: on CUDA that adds in another order every time.
        of_step = torch.where(here, losses.float(), 0).sum(dim=1)
        of_step, counts = processes.total(torch.stack([of_step, here.sum(dim=1).float()]))
        decay = DECAY**counts * (self.means > 0)
        means = decay * self.means + (1 - decay) * of_step / counts
        self.means.copy_(torch.where(means.isfinite(), means, self.means))
