"""Which guidance scale is best, and which can't be told from it."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from iclevr.labels import RESERVED
from judging.bench import Draws
from judging.figures import panels, plot_intervals, split_color
from judging.intervals import Interval, mean_interval
from judging.metrics import COUNTS, SHARES, split_means, summarise
from runtime.settings import to_dict


def indistinguishable(values: dict[float, np.ndarray], best: float) -> list[float] | None:
    """Scales that can't be told from the best one; None: a single draw tells none apart.

    The same picture is drawn from the same noise for every scale, so the differences are paired:
    a scale is told apart if the 95% t interval of its differences, value by value, excludes 0.
    The scales are not corrected for their number: of 20 equal ones, one may look worse.
    """
    if values[best].size < 2:  # one draw of something that is no mean over pictures
        return None
    result = []
    for scale, these in values.items():
        difference = mean_interval((values[best] - these).ravel())
        low, high = difference.low, difference.high
        alike = difference.mean == 0 if low is None else low <= 0 <= high
        if scale != best and alike:
            result.append(scale)
    return result


def summarise_sweep(draws: Draws, scales: list[float], seeds: list[int]) -> dict[str, Any]:
    """Rows of the table, and for each criterion the best scale and its equals.

    Intervals are Student's t over the seeds; for one seed, Wilson's for a split, and t over the
    pictures for the mean of the splits.
    """
    splits = list(next(iter(draws.values())).records)
    of_scale = {scale: [draws[scale, seed] for seed in seeds] for scale in scales}
    rows = [
        {"guidance_scale": scale}
        | {split: summarise([draw.records[split] for draw in these]) for split in splits}
        | {"mean": {}}
        for scale, these in of_scale.items()
    ]
    figures = list(SHARES)
    if all(draw.frechet is not None for these in of_scale.values() for draw in these):
        figures.append("frechet_distance")
    best = {}
    for figure in figures:
        least, values = figure == "frechet_distance", {}
        for row, (scale, these) in zip(rows, of_scale.items(), strict=True):
            if least:
                found = np.array([[draw.frechet] for draw in these])
            else:
                found = split_means([draw.records for draw in these], figure)
            over = found.mean(axis=1) if len(seeds) > 1 else found[0]
            interval = mean_interval(over, 0, math.inf if least else 1)
            (row if least else row["mean"])[figure] = interval
            values[scale] = found
        top = (min if least else max)(scales, key=lambda scale: float(values[scale].mean()))
        best[figure] = {"scale": top, "equals": indistinguishable(values, top)}
    return to_dict({"rows": rows, "best": best})


def intervals(row: dict[str, Any], figure: str) -> dict[str, dict[str, float | None]]:
    """Column -> a row's interval of a figure: of each split and their mean, or of all pictures."""
    if figure == "frechet_distance":
        return {"all": row[figure]}
    splits = [name for name in row if name not in RESERVED]
    return {column: row[column][figure] for column in (*splits, "mean") if figure in row[column]}


def cells(row: dict[str, Any]) -> dict[str, Interval]:
    """What the tables show of a row: column -> interval."""
    shown = {}
    for figure in (*SHARES, *COUNTS):
        name = figure.replace("_", " ") if figure in SHARES else figure
        shown |= {f"{column} {name}": i for column, i in intervals(row, figure).items()}
    if "frechet_distance" in row:
        shown["Frechet distance"] = row["frechet_distance"]
    return {name: Interval(**interval) for name, interval in shown.items()}


def verdict(summary: dict[str, Any]) -> str:
    """The result in words, a line for each criterion."""
    lines = []
    for figure, best in summary["best"].items():
        row = next(r for r in summary["rows"] if r["guidance_scale"] == best["scale"])
        *_, value = intervals(row, figure).values()
        text = f"best by {figure.replace('_', ' ')}: guidance scale {best['scale']:g}"
        text += f" ({value['mean']:.4f})"
        how = "paired t, 95%"
        if len(summary["rows"]) == 1:
            text += ", the only one drawn"
        elif best["equals"] is None:
            text += "; from a single draw no scale can be told from another"
        elif best["equals"]:
            equals = ", ".join(f"{e:g}" for e in best["equals"])
            text += f"; not distinguishable from it ({how}): {equals}"
        else:
            text += f"; every other scale is distinguishably worse ({how})"
        lines.append(text)
    return "\n".join(lines)


def sweep_chart(report: dict[str, Any], title: str) -> Figure:
    """Accuracy, exact sets and Frechet distance over the scale, with intervals; best marked."""
    rows, best = report["rows"], report["best"]
    scales = [row["guidance_scale"] for row in rows]
    figure, axes_of = panels(list(best), title, "guidance scale")
    for name, axes in axes_of.items():
        for number, column in enumerate(intervals(rows[0], name)):
            curve = [intervals(row, name)[column] for row in rows]
            label = None if column == "all" else column
            color = "black" if column in ("all", "mean") else split_color(number)
            plot_intervals(axes, scales, curve, color=color, label=label)
        top = best[name]["scale"]
        mean = curve[scales.index(top)]["mean"]  # of both splits, the last curve
        axes.plot(top, mean, "*", color="tab:red", markersize=15, label=f"best: {top:g}")
        if name == "frechet_distance":
            floor = report["frechet_distance_of_training_pictures"]
            axes.axhline(floor, color="gray", linestyle="--", label="as many training pictures")
        axes.legend(fontsize=8)
    return figure
