"""Figures of evaluated pictures, with their 95% intervals.

A record is what is kept of an evaluation: for every figure a number for each picture. Records of
several draws of the same conditions are summed up by `summarise`.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from judging.evaluator import Evaluation
from judging.intervals import Interval, accuracy_interval, mean_interval

SHARES = {"accuracy": "correct", "exact_sets": "exact", "exact_once": "once"}
"""Figures that are shares, and their name in a record."""
COUNTS = ("missing", "extra", "color_errors", "shape_errors")
"""Figures per picture."""

Record = dict[str, list[int]]


def record(evaluation: Evaluation) -> Record:
    """What can be summed up later, JSON-able."""
    names = ("total", *SHARES.values(), *COUNTS)
    return {name: getattr(evaluation, name).tolist() for name in names}


def summarise(records: Sequence[Record]) -> dict[str, Interval]:
    """Every figure over draws of the same conditions, one record a draw.

    accuracy: the course's, and accuracy_1, accuracy_2 ... for pictures of so many objects;
    exact_sets: share of pictures with exactly the objects asked for, exact_once: and with none of
    them twice; missing, extra, color_errors, shape_errors: objects per picture.
    Intervals of shares: Wilson's for one draw, else Student's t over draws; of numbers per picture:
    t over draws, or over pictures for one.
    """
    total, correct, exact, once, *counts = (
        np.array([r[name] for r in records]) for name in ("total", *SHARES.values(), *COUNTS)
    )
    total = total[0]
    figures = {
        "accuracy": accuracy_interval(correct.sum(axis=1).tolist(), int(total.sum())),
        "exact_sets": accuracy_interval(exact.sum(axis=1).tolist(), len(total)),
        "exact_once": accuracy_interval(once.sum(axis=1).tolist(), len(total)),
    } | {name: count_interval(values) for name, values in zip(COUNTS, counts, strict=True)}
    for size in np.unique(total).tolist():
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
    """How much more `first` finds than `second` in the same pictures, of a figure of `SHARES`.

    Two judges that score the same draws: Student's t over all pictures, each weighted by its
    objects for accuracy.
    """
    key = SHARES[name]
    a, b = (np.array([r[key] for r in records], dtype=float) for records in (first, second))
    weight = np.array(first[0]["total"]).mean() if name == "accuracy" else 1.0
    return mean_interval((a - b).ravel() / weight, -1, 1)


def split_means(draws: Sequence[dict[str, Record]], figure: str) -> np.ndarray:
    """(draws, pictures): shares of all splits' pictures, each row's mean being the draw's figure.

    The figure of a draw is the mean of its splits, which weigh alike.

    Args:
        draws: split -> record.
        figure: of `SHARES`.
    """
    rows = []
    for records in draws:
        shares = []
        for of_split in records.values():
            values = np.array(of_split[SHARES[figure]], dtype=float)
            whole = sum(of_split["total"]) if figure == "accuracy" else len(values)
            shares.append(values / whole)
        rows.append(np.concatenate(shares) * sum(map(len, shares)) / len(shares))
    return np.stack(rows)


def table(columns: dict[str, dict[str, Interval]]) -> str:
    """Markdown: a row for every figure, a column such as a split."""
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    return markdown(
        ["figure", *columns],
        ([name, *(figures.get(name, "-") for figures in columns.values())] for name in names),
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], num_texts: int = 1) -> str:
    """A table of which the first `num_texts` columns are text, the others numbers."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    rule = "|" + "---|" * num_texts + "---:|" * (len(head) - num_texts)
    return "\n".join([lines[0], rule, *lines[1:]])
