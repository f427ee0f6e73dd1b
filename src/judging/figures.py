"""For people: pictures in grids and strips, charts of figures with their intervals."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from iclevr.dataset import resize, to_uint8
from runtime.files import atomic_write


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a Pillow picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def to_png(image: Image.Image) -> bytes:
    """What `save_image` writes to a file.png."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A file as an address, for pages that hold it in themselves."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def save_image(image: Tensor | Image.Image, path: Path) -> None:
    """Write a picture, (3, H, W) in [-1, 1] or Pillow's, atomically."""
    image = to_image(image) if isinstance(image, Tensor) else image
    with atomic_write(path) as temporary:
        image.save(temporary)


def save_text(text: str, path: Path) -> None:
    """Write a text that ends in a newline, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a chart as PNG, atomically, and close it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


SIDE, PADDING = 128, 2
"""Pixels of a picture in a grid, and white ones around it."""


def split_color(number: int) -> str:
    """Of the splits in all charts, in their order: matplotlib's own cycle."""
    return f"C{number % 10}"


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> rows of `columns` pictures, each SIDE pixels wide."""
    return to_image(make_grid(resize(images, SIDE), nrow=columns, padding=PADDING, pad_value=1))


def strip(images: Tensor) -> Image.Image:
    """(K, 3, H, W) in [-1, 1] -> one row, for the way from noise to picture."""
    return grid(images, columns=len(images))


def pairs(images: Tensor, others: Tensor, columns: int = 8) -> Image.Image:
    """Two equally long sets (N, 3, H, W) in [-1, 1]: rows of one above rows of the other."""
    rows = []
    for start in range(0, len(images), columns):
        for part in (images[start : start + columns], others[start : start + columns]):
            part = resize(part, SIDE)
            blank = part.new_ones(columns - len(part), *part.shape[1:])
            rows.append(torch.cat([part, blank]))
    return grid(torch.cat(rows), columns)


def confusion_chart(confusion: Tensor, names: Sequence[str], title: str) -> plt.Figure:
    """Counts (K + 1, K + 1) as shares of their row: row asked for, column found, the last is
    nothing."""
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure, axes = plt.subplots(figsize=(9, 8.2), layout="constrained")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    ticks = range(len(names) + 1)
    axes.set_xticks(ticks, [*names, "nothing"], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [*names, "nothing"], fontsize=7)
    for i, j in (shares >= 0.05).nonzero().tolist():
        value = float(shares[i, j])
        axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6,
                  color="white" if value > 0.5 else "black")  # fmt: skip
    axes.set(xlabel="found", ylabel="asked for")
    axes.set_title(title, parse_math=False)  # a run's name may hold a $
    figure.colorbar(image, label="share of the row", shrink=0.7)
    return figure


def panels(names: Sequence[str], title: str, xlabel: str) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """A chart for each figure, one below the other over the same x."""
    figure, axes = plt.subplots(
        len(names), 1, figsize=(8, 1 + 3 * len(names)), sharex=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    found = dict(zip(names, axes[:, 0], strict=True))
    for name, panel in found.items():
        panel.set(ylabel=f"{name.replace('_', ' ')}\n(95% interval)")
        panel.grid(alpha=0.3)
    axes[0, 0].set_title(title, parse_math=False)
    axes[-1, 0].set(xlabel=xlabel)
    return figure, found


def plot_intervals(
    axes: plt.Axes, x: Sequence[float], intervals: Sequence[dict[str, Any]], style: str = "o-",
    band: bool = True, **more: Any,
) -> None:  # fmt: skip
    """Means over x, their intervals as a band or as bars.

    Args:
        intervals: of each x, `vars` of an Interval; one without spread has no width.
        style: of line and markers, matplotlib's `fmt`.
        more: color, label.
    """
    mean, low, high = (
        np.array([i["mean"] if i[end] is None else i[end] for i in intervals])
        for end in ("mean", "low", "high")
    )
    (line,) = axes.plot(x, mean, style, markersize=4, **more)
    if band:
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
    else:
        axes.errorbar(x, mean, (mean - low, high - mean), fmt="none", capsize=2, linewidth=1,
                      color=line.get_color())  # fmt: skip
