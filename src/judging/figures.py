"""Pictures for people: single ones, grids, strips."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from iclevr.dataset import resize, to_uint8
from runtime.files import atomic_write

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a Pillow picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def save_image(image: Tensor | Image.Image, path: Path) -> None:
    """Write a picture, (3, H, W) in [-1, 1] or Pillow's, atomically."""
    image = to_image(image) if isinstance(image, Tensor) else image
    with atomic_write(path) as temporary:
        image.save(temporary)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a chart as PNG, atomically, and close it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def grid(images: Tensor, columns: int = 8, side: int = 128) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> rows of `columns` pictures, each `side` pixels wide."""
    return to_image(make_grid(resize(images, side), nrow=columns, padding=2, pad_value=1))


def strip(images: Tensor, side: int = 128) -> Image.Image:
    """(K, 3, H, W) in [-1, 1] -> one row, for the way from noise to picture."""
    return grid(images, columns=len(images), side=side)


def pairs(images: Tensor, others: Tensor, columns: int = 8, side: int = 128) -> Image.Image:
    """Two equally long sets (N, 3, H, W) in [-1, 1]: rows of one above rows of the other."""
    rows = []
    for start in range(0, len(images), columns):
        for part in (images[start : start + columns], others[start : start + columns]):
            part = resize(part, side)
            blank = part.new_ones(columns - len(part), *part.shape[1:])
            rows.append(torch.cat([part, blank]))
    return grid(torch.cat(rows), columns, side)


def confusion_chart(shares: Tensor, names: Sequence[str], title: str, path: Path) -> None:
    """Shares (K + 1, K + 1) as a heat map: row asked for, column found, the last is nothing."""
    figure, axes = plt.subplots(figsize=(9, 8.2), layout="constrained")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    ticks = range(len(names) + 1)
    axes.set_xticks(ticks, [*names, "nothing"], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [*names, "nothing"], fontsize=7)
    for i, j in (shares >= 0.05).nonzero().tolist():
        value = float(shares[i, j])
        axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6,
                  color="white" if value > 0.5 else "black")  # fmt: skip
    axes.set(xlabel="found", ylabel="asked for", title=title)
    figure.colorbar(image, label="share of the row", shrink=0.7)
    save_figure(figure, path)
