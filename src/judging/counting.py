"""How often something stands there: a judge of the course's kind says what does, not how often.

A scene with two cyan cylinders where one was asked for is exact to it, and i-CLEVR shows no object
twice, so no score of that kind could learn to tell. Colors can: pixels of one hue that hang
together are an object. What is found is the least that there is, as two that touch are one, and
gray objects have no hue.
"""

from collections import Counter

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from iclevr.labels import decode_labels

HUES = {
    "red": 0.002, "brown": 0.097, "yellow": 0.156, "green": 0.305, "cyan": 0.497, "blue": 0.624,
    "purple": 0.789,
}  # fmt: skip
"""CLEVR's colors in turns of the color circle, as they look in a rendered picture: means of 25
training pictures of the stand-in with one object."""
LEAST_CHROMA = 0.08
"""Of values in [0, 1]: what is paler is ground."""
LEAST_PIXELS = 10
"""Of a picture of 64x64; smaller blobs are edges in a color between two others."""


def color_of(name: str) -> str | None:
    """The color in an object's name, if it is one that can be counted."""
    color = name.split(" ")[0]
    return color if color in HUES else None


def color_blobs(image: Tensor, colors: set[str]) -> dict[str, int]:
    """How many blobs of each of these colors a picture (3, S, S) in [-1, 1] shows."""
    red, green, blue = rgb = image.float().cpu().numpy() / 2 + 0.5
    chroma = rgb.max(0) - rgb.min(0)
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
    apart = np.stack([np.abs((hue - HUES[color] + 0.5) % 1 - 0.5) for color in HUES])
    nearest, least = apart.argmin(0), LEAST_PIXELS * (image.shape[-1] / 64) ** 2
    blobs = {}
    for color in colors:
        shown = (chroma > LEAST_CHROMA) & (nearest == [*HUES].index(color))
        parts, found = ndimage.label(shown, np.ones((3, 3)))
        sizes = np.asarray(ndimage.sum(shown, parts, range(1, found + 1)) if found else [])
        blobs[color] = int((sizes >= least).sum())
    return blobs


def too_many(images: Tensor, labels: Tensor, objects: dict[str, int]) -> Tensor:
    """How many blobs each picture shows beyond the objects of their color that were asked for.

    Only colors that were asked for are looked at.

    Args:
        images: (N, 3, S, S) in [-1, 1].
        labels: (N, K) multi-hot.

    Returns:
        (N,) integers on the CPU; 0 as well where nothing of a color that can be counted was asked
    """
    found = torch.zeros(len(labels), dtype=torch.long)
    for n, (image, row) in enumerate(zip(images, labels, strict=True)):
        asked = Counter(color_of(name) for name in decode_labels(row, objects))
        del asked[None]
        blobs = color_blobs(image, {*asked}) if asked else {}
        found[n] = sum(max(0, blobs[color] - count) for color, count in asked.items())
    return found
