"""Seeds: one for every picture and every training step, so that neither depends on a batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def picture_seeds(seed: int, count: int, purpose: int = 0) -> list[int]:
    """One seed for every picture of a set; sets with other `seed`s or purposes share none."""
    return [derive_seed(seed, purpose, i) for i in range(count)]


def derive_seed(seed: int, purpose: int, number: int) -> int:
    """A 64-bit seed from three numbers.

    Purpose 0: test picture `number`, 1: training step, 2: picture for the Frechet distance,
    3: the choice of conditions for it, 4: further picture `number` of the picture with that seed,
    5: the noise that it is weighed with, 6: picture of a training step that a reward model sees,
    7: the choice of conditions for it, 8: how it is disturbed, 9: the noise that a place
    for another object is looked for with, 10: what is pasted into the pictures of a step.
    """
    return int(np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)[0])


def draw_noise(generators: Sequence[torch.Generator], size: int) -> Tensor:
    """Standard normal (N, 3, S, S) on the CPU, from each picture's own generator."""
    return torch.cat([torch.randn(1, 3, size, size, generator=g) for g in generators])
