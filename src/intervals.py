"""Figures with their spread: 95% intervals of proportions and of means."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    mean: float
    low: float | None
    high: float | None
    """None: a single draw of something whose spread can't be told from one."""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion_interval(successes: int, trials: int) -> Interval:
    """Wilson's score interval (Wilson 1927) of one draw: `successes` of `trials`, trials >= 1."""
    result = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of >= 2 independent draws with Student's t interval."""
    values = np.asarray(values, dtype=float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean, mean - float(half), mean + float(half))


def accuracy_interval(correct: Sequence[int], total: int) -> Interval:
    """Accuracy over draws of `total` objects each, the interval within [0, 1].

    Student's t over the draws; Wilson for one draw, and for draws that happen to be equal, where
    t would claim certainty.
    """
    if len(set(correct)) == 1:
        return proportion_interval(sum(correct), total * len(correct))
    return clip(mean_interval([c / total for c in correct]))


def clip(interval: Interval) -> Interval:
    """The interval of a share, which can't leave [0, 1]."""
    return Interval(interval.mean, max(interval.low, 0.0), min(interval.high, 1.0))


def frechet_interval(distances: Sequence[float]) -> Interval:
    """Student's t over draws, not below 0; of a single draw only the figure itself."""
    if len(distances) == 1:
        return Interval(distances[0], None, None)
    interval = mean_interval(distances)
    return Interval(interval.mean, max(interval.low, 0.0), interval.high)
