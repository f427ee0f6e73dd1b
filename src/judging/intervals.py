"""Figures with their spread: 95% intervals of proportions and of means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    mean: float
    low: float | None
    high: float | None
    """None: the spread can't be told."""

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion_interval(successes: int, trials: int) -> Interval:
    """Wilson's score interval (Wilson 1927) of one draw: `successes` of `trials`, trials >= 1."""
    from scipy import stats  # takes seconds to load, which a run without intervals need not wait

    result = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def mean_interval(
    values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
) -> Interval:
    """Mean of independent draws of a number in [lowest, highest], with Student's t interval.

    Without an interval where nothing varies, be it a single draw: t would claim certainty.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(set(values.tolist())) == 1:
        return Interval(mean, None, None)
    t = special.stdtrit(len(values) - 1, 0.975)
    half = float(t * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, max(mean - half, lowest), min(mean + half, highest))


def accuracy_interval(correct: Sequence[int], total: int) -> Interval:
    """Accuracy over draws of `total` objects each.

    Student's t over the draws; Wilson for one draw, and for draws that happen to be equal.
    """
    if len(set(correct)) == 1:
        return proportion_interval(sum(correct), total * len(correct))
    return mean_interval([c / total for c in correct], 0, 1)
