"""Where objects, camera and lamps of a sequence stand: CLEVR's rules, i-CLEVR's habits."""

import numpy as np

from iclevr.held_out import NOTHING, HeldOut
from iclevr.ray_tracer import LAMPS, hit, object_ids, rays_of, unit
from iclevr.scene import CAMERA, PICTURES, RADIUS, Item, Sequence, sample_labels

CAMERA_JITTER, LAMP_JITTER = 0.5, 1.0
"""Largest shift of camera and lamps along each axis (CLEVR)."""

# Where the objects after the first stand, measured on pictures of i-CLEVR: near the edge of
# CLEVR's square [-3, 3]^2, that is max(|x|, |y|) in [INNER, OUTER], and seldom far back.
INNER, OUTER = 2.3, 3.0
FRONT_BIAS = np.array([0.6, 0.12])
"""Chance to keep a place: a + b * (its distance in front of the centre, -4.2 to 4.2)."""
GAP, MARGIN = 0.25, 0.4
"""Least distance between objects, and between their centres along the camera's axes (CLEVR)."""
MIN_PIXELS = 200
"""Least visible pixels of an object in a picture of 320x240 (CLEVR)."""
MAX_RETRIES = 50
"""Places tried for a further object (CLEVR)."""


def sample_sequence(
    seed: int, i: int, count: int = PICTURES, held_out: HeldOut = NOTHING
) -> Sequence:
    """Draw sequence i of `count` objects, three or more; it depends on nothing but the arguments.

    The first three are placed together, further ones one by one as CLEVR does it: where no room
    is left, all places are drawn anew.
    """
    rng = np.random.default_rng([seed, i, 1])
    camera = CAMERA + rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)
    positions = np.array([lamp[0] for lamp in LAMPS])
    lamps = positions + rng.uniform(-LAMP_JITTER, LAMP_JITTER, positions.shape)
    labels = sample_labels(seed, i, count, held_out)

    def fitting(places: np.ndarray, angles: np.ndarray, chances: np.ndarray) -> Sequence | None:
        items = tuple(
            Item(index, float(x), float(y), float(angle))
            for index, (x, y), angle in zip(labels[: len(places)], places, angles, strict=True)
        )
        sequence = Sequence(camera, lamps, items)
        return sequence if _well_placed(places, camera, chances) and _well_seen(sequence) else None

    while True:
        places = np.zeros((PICTURES, 2))
        places[1:] = rng.uniform(-OUTER, OUTER, (PICTURES - 1, 2))
        angles = rng.uniform(0, 2 * np.pi, PICTURES)
        chances = rng.random(PICTURES - 1)
        sequence = fitting(places, angles, chances)
        if sequence is None:
            continue
        for _ in range(MAX_RETRIES * (count - PICTURES)):
            place, angle = rng.uniform(-OUTER, OUTER, (1, 2)), rng.uniform(0, 2 * np.pi, 1)
            more = np.r_[places, place], np.r_[angles, angle], np.r_[chances, rng.random(1)]
            if longer := fitting(*more):
                sequence, (places, angles, chances) = longer, more
                if len(places) == count:
                    break
        if len(places) == count:
            return sequence


def _well_placed(places: np.ndarray, camera: np.ndarray, chances: np.ndarray) -> bool:
    """CLEVR's gap and margins; near the edge of the square and seldom far back, as in i-CLEVR."""
    front = unit(camera[:2])
    right = np.array([-front[1], front[0]])
    first, second = np.triu_indices(len(places), 1)
    apart = places[first] - places[second]
    return bool(
        np.abs(places[1:]).max(1).min() >= INNER
        and (chances < FRONT_BIAS @ [np.ones(len(chances)), places[1:] @ front]).all()
        and np.linalg.norm(apart, axis=1).min() >= 2 * RADIUS + GAP
        and np.abs(apart @ np.stack([front, right], 1)).min() >= MARGIN
    )


def _well_seen(sequence: Sequence) -> bool:
    """Every object inside the frame and, behind all others, with enough visible pixels."""
    width, height = 160, 120
    origin, rays = sequence.camera[:, None], rays_of(sequence.camera, width, height)
    alone = [np.isfinite(hit(item, origin, rays)) for item in sequence.items]
    alone = np.reshape(alone, (-1, height, width))
    cut = alone[:, [0, -1]].any() or alone[:, :, [0, -1]].any()
    count = len(sequence.items)
    ids = object_ids(sequence, count, width, height)
    shown = min((ids == k).sum() for k in range(count))
    return not cut and shown * (320 * 240) / (width * height) >= MIN_PIXELS
