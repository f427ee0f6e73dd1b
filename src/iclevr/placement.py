"""Where objects, camera and lamps of a sequence stand: CLEVR's rules, i-CLEVR's habits."""

import numpy as np

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


def sample_sequence(seed: int, i: int) -> Sequence:
    """Draw sequence i; it depends on nothing but the two numbers."""
    rng = np.random.default_rng([seed, i, 1])
    camera = CAMERA + rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)
    positions = np.array([lamp[0] for lamp in LAMPS])
    lamps = positions + rng.uniform(-LAMP_JITTER, LAMP_JITTER, positions.shape)
    labels = sample_labels(seed, i)
    while True:
        places = np.zeros((PICTURES, 2))
        places[1:] = rng.uniform(-OUTER, OUTER, (PICTURES - 1, 2))
        angles = rng.uniform(0, 2 * np.pi, PICTURES)
        chances = rng.random(PICTURES - 1)
        items = tuple(
            Item(index, float(x), float(y), float(angle))
            for index, (x, y), angle in zip(labels, places, angles, strict=True)
        )
        sequence = Sequence(camera, lamps, items)
        if _well_placed(places, camera, chances) and _well_seen(sequence):
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
    alone = np.reshape(alone, (PICTURES, height, width))
    cut = alone[:, [0, -1]].any() or alone[:, :, [0, -1]].any()
    ids = object_ids(sequence, PICTURES, width, height)
    shown = min((ids == k).sum() for k in range(PICTURES))
    return not cut and shown * (320 * 240) / (width * height) >= MIN_PIXELS
