"""Objects cut out of training pictures and pasted into others, for a classifier that counts.

No picture of i-CLEVR shows an object twice, so a classifier that learns from them can't tell two
red cubes from one, and a network that learns from its opinion draws two. But a sequence adds one
object to each picture, while camera and lamps stay: what has changed is that object, which can be
cut out and pasted (as Dwibedi et al. 2017 and Ghiasi et al. 2021 do) into a picture that has it
already, or, so that the seams tell nothing, into one that has not.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from iclevr.dataset import IclevrDataset
from runtime.output import progress_bar
from runtime.settings import UserError

LEAST_CHANGE = 16
"""Levels of 255 by which a pixel changes where an object has come: more than soft shadows do."""
LEAST_AREA = 12 / 64**2
"""Of a picture: what is smaller is an object that others hide."""
FIRST_OBJECT = 0.34, 0.6, 0.4, 0.6
"""Top, bottom, left and right of the first object, which i-CLEVR puts at the centre."""
MOST_HIDDEN = 0.2
"""Of a pasted object's pixels, those that may lie on other objects."""
TRIES = 10
"""Places that are tried for an object."""
MOST_UP_DOWN = 3 / 64
"""Of a picture's height: objects further away are smaller, so a pasted one stays about as far."""


class CutOuts:
    """The objects that were added to the pictures of some sequences.

    Args:
        which: indices of the pictures to cut from, whole sequences.

    Raises:
        UserError: in no picture an object was added to the one before it.
    """

    def __init__(self, data: IclevrDataset, which: list[int]):
        self.labels = data.labels
        self.images: dict[int, np.ndarray] = {}
        """Crops (3, h, w) uint8, by the picture that they are from."""
        self.places: dict[int, tuple[np.ndarray, int, int]] = {}
        """Their masks (h, w) bool, and row and column of their first pixel."""
        self.of_object: dict[int, list[int]] = defaultdict(list)
        """The pictures that each object was added in."""
        self.before = pictures_before(data.names, which)
        pairs = progress_bar(self.before.items(), desc="cut objects out", unit="picture")
        for now, before in pairs:
            new = (data.labels[now] - data.labels[before]).nonzero().flatten().tolist()
            if len(new) == 1 and data.labels[now, new[0]] == 1:
                self.cut(data.images[now], data.images[before], now)
            if now in self.images:
                self.of_object[new[0]].append(now)
        if not self.of_object:
            raise UserError(
                "--paste: no picture of train.json adds an object to the one before it "
                "(CLEVR_train_000000_1.png to CLEVR_train_000000_0.png); leave it out"
            )

    def cut(self, now: np.ndarray, before: np.ndarray, index: int) -> None:
        """Find what came into a picture (3, S, S), unless next to nothing of it is seen."""
        from scipy import ndimage

        change = np.abs(now.astype(int) - before).max(axis=0) > LEAST_CHANGE
        margin = 4  # closing takes what is outside for unchanged
        whole = np.ones((3, 3))
        closed = ndimage.binary_closing(np.pad(change, margin), whole, iterations=2)
        parts, count = ndimage.label(closed[margin:-margin, margin:-margin], whole)
        if not count:
            return
        sizes = ndimage.sum(parts > 0, parts, range(1, count + 1))
        largest = ndimage.binary_fill_holes(parts == 1 + np.argmax(sizes))
        if largest.mean() < LEAST_AREA:
            return
        box = ndimage.find_objects(largest.astype(int))[0]
        self.images[index] = now[:, *box].copy()
        self.places[index] = largest[box], box[0].start, box[1].start

    def occupied(self, index: int, side: int) -> np.ndarray:
        """(side, side) bool: where the objects of a picture are."""
        top, bottom, left, right = (round(share * side) for share in FIRST_OBJECT)
        taken = np.zeros((side, side), dtype=bool)
        taken[top:bottom, left:right] = True
        while True:
            if index in self.places:
                mask, y, x = self.places[index]
                taken[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask
            if index not in self.before:
                return taken
            index = self.before[index]

    def paste(
        self, images: Tensor, index: Tensor, share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Paste an object into some of the pictures: half of the times one that is there already.

        Args:
            images: (n, 3, S, S) uint8, pictures `index` of the data set; left as they are.
            share: of the pictures that get an object.

        Returns:
            the pictures, and (n, K) labels: 1 where an object is there exactly once.
        """
        images, labels = images.clone(), self.labels[index.cpu()].clone()
        chances = torch.rand(len(index), 4 + 2 * TRIES, generator=generator, device="cpu").numpy()
        for n, (number, chance) in enumerate(zip(index.tolist(), chances, strict=True)):
            if chance[0] >= share:
                continue
            again = bool(chance[1] < 0.5)
            wanted = (labels[n].bool() == again).nonzero().flatten().tolist()
            classes = [k for k in wanted if self.of_object[k]]
            if not classes:
                continue
            k = classes[int(chance[2] * len(classes))]
            chosen = self.of_object[k][int(chance[3] * len(self.of_object[k]))]
            if self.place(images[n], number, chosen, chance[4:]):
                labels[n, k] = 0 if again else 1
        return images, labels

    def place(self, image: Tensor, number: int, chosen: int, chances: np.ndarray) -> bool:
        """Paste a cut-out into picture `number`, where there is room; False: there is none."""
        mask, y, _ = self.places[chosen]
        (height, width), side = mask.shape, image.shape[-1]
        taken = self.occupied(number, side)
        reach = MOST_UP_DOWN * side
        for up_down, across in chances.reshape(TRIES, 2):
            top = min(max(round(y + (2 * up_down - 1) * reach), 0), side - height)
            left = int(across * (side - width + 1))
            here = slice(top, top + height), slice(left, left + width)
            if (taken[here] & mask).sum() <= MOST_HIDDEN * mask.sum():
                pixels, at = torch.from_numpy(self.images[chosen]), torch.from_numpy(mask)
                image[:, *here] = torch.where(
                    at.to(image.device), pixels.to(image.device), image[:, *here]
                )
                return True
        return False


def pictures_before(names: list[str], which: list[int]) -> dict[int, int]:
    """Of the pictures that add an object: the index of the one before, by their names' numbers."""
    number = {names[i]: i for i in which}
    before = {}
    for name, i in number.items():
        stem, _, suffix = name.rpartition(".")
        sequence, _, place = stem.rpartition("_")
        if place.isascii() and place.isdigit() and int(place):
            previous = f"{sequence}_{int(place) - 1}.{suffix}"
            if previous in number:
                before[i] = number[previous]
    return before
