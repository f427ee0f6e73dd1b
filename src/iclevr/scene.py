"""What a stand-in scene holds: CLEVR's objects and camera, and the labels of every sequence.

i-CLEVR (El-Nouby et al. 2019) adds objects one by one to a scene of CLEVR (Johnson et al. 2017).
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from iclevr.held_out import NOTHING, HeldOut
from runtime.settings import UserError

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {  # linear RGB times 255: decoding them as sRGB comes out far too dark
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
"""Object names in the order of their index, 8 * shape + color."""
OBJECTS = {name: index for index, name in enumerate(NAMES)}
"""What objects.json holds."""

PICTURES, MOST_PICTURES = 3, 5
"""Pictures of a sequence, each with one object more: of the course's, and of i-CLEVR's own."""
RADIUS = 0.58
"""Radius of spheres and cylinders and half side of cubes, in scene units: the size in the
pictures of i-CLEVR."""
CAMERA = (7.48113, -6.50764, 5.34367)
"""Where the camera stands; it looks at the origin (CLEVR)."""

CONDITION_SEQUENCES = 200
"""Test conditions are label sets of the first this many sequences."""
TEST_COUNTS, NEW_TEST_COUNTS = (6, 12, 14), (0, 12, 20)
"""Conditions of 1, 2 and 3 objects in the course's test.json and new_test.json."""
MOST_TRIES = 10_000
"""Sequences drawn for one that shows nothing held out."""
LARGE, LARGE_COUNT = {"four": 4, "five": 5}, 48
"""Files of conditions with more objects than the course's training pictures have."""


@dataclass(frozen=True)
class Item:
    """One object: index into NAMES, place on the ground, rotation in radians."""

    index: int
    x: float
    y: float
    angle: float

    @property
    def shape(self) -> str:
        return SHAPES[self.index // len(COLORS)]

    @property
    def albedo(self) -> list[float]:
        return [value / 255 for value in COLORS[NAMES[self.index].split()[0]]]


@dataclass(frozen=True)
class Sequence:
    """Camera (3,), lamps (3, 3) and the objects in the order in which they appear."""

    camera: np.ndarray
    lamps: np.ndarray
    items: tuple[Item, ...]


def sample_labels(
    seed: int, i: int, count: int = PICTURES, held_out: HeldOut = NOTHING
) -> list[int]:
    """Indices of the distinct objects of sequence i, in order of appearance.

    Nothing in `held_out` is shown on the way; a sequence that would is drawn anew, the others are
    as they are without it. With nothing held out, a longer sequence starts as the shorter one.

    Raises:
        UserError: so much is held out that no sequence is found.
    """
    rng = np.random.default_rng([seed, i, 0])
    for _ in range(MOST_TRIES):
        labels = rng.permutation(len(NAMES))[:count].tolist()
        names = [NAMES[n] for n in labels]
        if not any(held_out.holds(names[:k]) for k in range(2, count + 1)):
            return labels
    raise UserError(
        f"--hold_out_sets, --hold_out_pairs: leave too few scenes of {count} objects; use less"
    )


def make_conditions(seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """The conditions of test.json and new_test.json: no set of objects twice, all 24 objects
    about equally often, all from the first sequences, so that training pictures show them."""
    rng = np.random.default_rng([seed, 0, 2])  # 0 and 1 are those of sequence 0
    used: set[frozenset[int]] = set()
    seen: Counter[int] = Counter()

    def pick(size: int) -> list[str]:
        sets = [sample_labels(seed, i)[:size] for i in range(CONDITION_SEQUENCES)]
        free = [labels for labels in sets if frozenset(labels) not in used]
        rng.shuffle(free)
        best = min(free, key=lambda labels: sum(2 * seen[n] + 1 for n in labels))
        used.add(frozenset(best))
        seen.update(best)
        return [NAMES[n] for n in best]

    def split(counts: tuple[int, ...]) -> list[list[str]]:
        return [pick(size) for size, n in enumerate(counts, 1) for _ in range(n)]

    return split(TEST_COUNTS), split(NEW_TEST_COUNTS)


def make_large_conditions(seed: int) -> dict[str, list[list[str]]]:
    """The conditions of four.json and five.json: LARGE_COUNT sets of distinct objects each, all
    24 objects about equally often."""
    rng = np.random.default_rng([seed, 0, 5])
    result = {}
    for name, size in LARGE.items():
        deck: list[int] = []
        conditions = []
        for _ in range(LARGE_COUNT):
            if len(deck) < size:  # a new deck below the rest of the old one, nothing twice
                fresh = rng.permutation(len(NAMES)).tolist()
                deck += [n for n in fresh if n not in deck] + [n for n in fresh if n in deck]
            conditions.append([NAMES[n] for n in deck[:size]])
            deck = deck[size:]
        result[name] = conditions
    return result
