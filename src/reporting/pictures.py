"""Pictures and charts as data URIs, which a page holds in itself."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image

from judging.figures import PADDING, SIDE, data_uri, split_color, to_png
from judging.metrics import SHARES
from reporting.results import Test

PANELS = {
    "loss": ("loss",),
    "learning rate": ("lr",),
    "previews": ("preview_accuracy", "preview_exact_sets"),
}
"""What is drawn of a training: panel -> entries of metrics.jsonl."""

DAMAGED = (OSError, ValueError, SyntaxError)
"""What Pillow raises of damaged files."""


def picture_uri(path: Path) -> str | None:
    """A PNG; None if it is not there or damaged."""
    try:
        content = path.read_bytes()
        Image.open(io.BytesIO(content)).load()
    except DAMAGED:
        return None
    return data_uri(content)


def grid_uri(path: Path, rows: int | None = None) -> str | None:
    """A picture of `grid`, or its first rows, half as large; None if it is not there or damaged.

    Its pictures are then about as large as drawn.
    """
    try:
        with Image.open(path) as image:
            height = min(image.height, rows * (SIDE + PADDING) + PADDING) if rows else image.height
            half = image.crop((0, 0, image.width, height)).resize((image.width // 2, height // 2))
    except DAMAGED:
        return None
    return data_uri(to_png(half))


def svg(figure: plt.Figure) -> str:
    """A chart; closes it."""
    content = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "report"}):  # the same chart is the same file
        figure.savefig(content, format="svg", metadata={"Date": None})
    plt.close(figure)
    return data_uri(content.getvalue(), "image/svg+xml")


def training_chart(log: Sequence[dict[str, Any]]) -> str | None:
    """Loss, learning rate and the previews' accuracy over steps; None if nothing was logged."""
    curves = {}
    for panel, names in PANELS.items():
        for name in names:
            points = [(line["step"], line[name]) for line in log if is_number(line.get(name))]
            if points:
                curves.setdefault(panel, {})[name] = points
    if not curves:
        return None
    figure, axes_of = plt.subplots(
        len(curves), 1, figsize=(8, 0.6 + 1.7 * len(curves)), sharex=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, (panel, lines) in zip(axes_of[:, 0], curves.items(), strict=True):
        for name, points in lines.items():
            style = "o-" if panel == "previews" else "-"
            label = name.removeprefix("preview_").replace("_", " ")
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=label)
        axes.set(ylabel=panel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if panel == "previews":
            axes.set(ylim=(0, 1))
            axes.legend(fontsize=8)
    if "loss" in curves:
        axes_of[0, 0].set(yscale="log")
    axes_of[-1, 0].set(xlabel="step")
    return svg(figure)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def tests_chart(tests: dict[str, Test]) -> str:
    """Accuracy and exact sets of several tests, by their names, with intervals."""
    known = [found for test in tests.values() for found in test.figures.values()]
    shares = [name for name in SHARES if all(name in found for found in known)]
    figure, axes_of = plt.subplots(
        1, len(shares), figsize=(8, 0.9 + 0.42 * len(tests)), sharey=True, layout="constrained"
    )
    for axes, figure_name in zip(axes_of, shares, strict=True):
        splits = list(next(iter(tests.values())).figures)
        for number, split in enumerate(splits):
            lift, color = 0.48 * ((number + 0.5) / len(splits) - 0.5), split_color(number)
            for y, test in enumerate(tests.values()):
                found = test.figures[split][figure_name]
                ends = [found.mean if end is None else end for end in (found.low, found.high)]
                axes.plot(ends, [y + lift] * 2, color=color, linewidth=1.2)
                axes.plot(found.mean, y + lift, "o", color=color, markersize=4,
                          label=None if y else split)  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=f"{figure_name.replace('_', ' ')} (95% interval)")
        axes.grid(alpha=0.3, axis="x")
    axes_of[0].set_yticks(range(len(tests)), list(tests), fontsize=8)
    axes_of[0].invert_yaxis()
    axes_of[-1].legend(fontsize=8)
    return svg(figure)
