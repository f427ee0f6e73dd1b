"""One object by itself, for those who choose among them."""

import functools

import numpy as np

from iclevr.ray_tracer import LAMPS, render_picture
from iclevr.scene import CAMERA, OBJECTS, Item, Sequence

CLOSER = 0.5
"""How near the camera comes, as a share of its distance in the pictures."""
ANGLE = 0.55
"""Of cubes, in radians: two of their sides and the top are seen."""


@functools.cache
def portrait(name: str, side: int = 68) -> np.ndarray | None:
    """uint8 (side, side, 3): the object alone; None for one that the renderer doesn't know."""
    if name not in OBJECTS:
        return None
    lamps = np.array([position for position, _, _ in LAMPS])
    item = Item(OBJECTS[name], 0.0, 0.0, ANGLE)
    sequence = Sequence(np.array(CAMERA) * CLOSER, lamps, (item,))
    # The camera looks at the spot on the ground: the object stands in the middle above it.
    width, height = round(2.2 * side), round(1.38 * side)
    picture = render_picture(sequence, 1, width, height, samples=8)
    left = (width - side) // 2
    return picture[:side, left : left + side]
