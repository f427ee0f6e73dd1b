"""Figures of evaluated pictures, with their 95% intervals.

A record is what is kept of an evaluation: for every figure a number for each picture. Records of
several draws of the same conditions are summed up by `summarise`.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from judging.evaluator import Evaluation
from judging.intervals import Interval, accuracy_interval, mean_interval

SHARES = {"accuracy": "correct", "exact_sets": "exact"}
"""Figures that are shares, and their name in a record."""
COUNTS = ("missing", "extra", "color_errors", "shape_errors")
"""Figures per picture."""

Record = dict[str, list[int]]


def record(evaluation: Evaluation) -> Record:
    """What can be summed up later, JSON-able."""
    names = ("total", "correct", "exact", *COUNTS)
    return {name: getattr(evaluation, name).tolist() for name in names}


def summarise(records: Sequence[Record]) -> dict[str, Interval]:
    """Every figure over draws of the same conditions, one record a draw.

    accuracy: the course's, and accuracy_1, accuracy_2 ... for pictures of so many objects;
    exact_sets: share of pictures with exactly the objects asked for; missing, extra,
    color_errors, shape_errors: objects per picture. Intervals of shares: Wilson's for one draw,
    else Student's t over draws; of numbers per picture: t over draws, or over pictures for one.
    """
    total = np.array(records[0]["total"])
    correct, exact = (np.array([r[name] for r in records]) for name in ("correct", "exact"))
    figures = {
        "accuracy": accuracy_interval(correct.sum(axis=1).tolist(), int(total.sum())),
        "exact_sets": accuracy_interval(exact.sum(axis=1).tolist(), len(total)),
    }
    for name in COUNTS:
        figures[name] = count_interval(np.array([r[name] for r in records]))
    for size in sorted(set(total.tolist())):
        these = total == size
        figures[f"accuracy_{size}"] = accuracy_interval(
            correct[:, these].sum(axis=1).tolist(), int(total[these].sum())
        )
    return figures


def count_interval(counts: np.ndarray) -> Interval:
    """Mean number per picture of counts (draws, pictures).

    Student's t over the draws; over the pictures for one draw, and for draws that happen to be
    equal.
    """
    per_draw = counts.mean(axis=1)
    if len(set(per_draw.tolist())) > 1:
        return mean_interval(per_draw, lowest=0)
    return mean_interval(counts.ravel(), lowest=0)


def paired_difference(first: Sequence[Record], second: Sequence[Record], name: str) -> Interval:
    """How much more `first` finds than `second` in the same pictures, of accuracy or exact sets.

    Two judges that score the same draws: Student's t over all pictures, each weighted by its
    objects for accuracy.
    """
    key = SHARES[name]
    a, b = (np.array([r[key] for r in records], dtype=float) for records in (first, second))
    weight = np.array(first[0]["total"]).mean() if name == "accuracy" else 1.0
    return mean_interval((a - b).ravel() / weight, -1, 1)


def table(columns: dict[str, dict[str, Interval]]) -> str:
    """Markdown: a row for every figure, a column such as a split."""
    rows = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    lines = [f"| figure | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in rows:
        cells = [str(figures.get(name, "-")) for figures in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def confusion_shares(confusion: Tensor) -> Tensor:
    """Counts (K + 1, K + 1) -> shares of each row; rows without any stay 0."""
    return confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
