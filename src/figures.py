"""Pictures for people: single ones, grids, strips."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from dataset import resize, to_uint8
from files import atomic_write


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a Pillow picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def save_image(image: Tensor | Image.Image, path: Path) -> None:
    """Write a picture, (3, H, W) in [-1, 1] or Pillow's, atomically."""
    image = to_image(image) if isinstance(image, Tensor) else image
    with atomic_write(path) as temporary:
        image.save(temporary)


def grid(images: Tensor, columns: int = 8, side: int = 128) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> rows of `columns` pictures, each `side` pixels wide."""
    return to_image(make_grid(resize(images, side), nrow=columns, padding=2, pad_value=1))


def strip(images: Tensor, side: int = 128) -> Image.Image:
    """(K, 3, H, W) in [-1, 1] -> one row, for the way from noise to picture."""
    return grid(torch.as_tensor(images), columns=len(images), side=side)
