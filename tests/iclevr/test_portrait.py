"""Pictures of single objects."""

import colorsys
import statistics

import numpy as np

from iclevr.portrait import portrait
from iclevr.scene import COLORS, NAMES


def hue(rgb):
    return colorsys.rgb_to_hsv(*rgb)[0]


def test_every_object_has_a_portrait_of_its_color_in_the_middle():
    pictures = {name: portrait(name) for name in NAMES}
    assert len({picture.tobytes() for picture in pictures.values()}) == 24
    for name, picture in pictures.items():
        assert picture.shape == (68, 68, 3) and picture.dtype == np.uint8
        middle = picture[24:44, 24:44].reshape(-1, 3).mean(axis=0) / 255
        color = name.split()[0]
        if color == "gray":
            assert statistics.pstdev(middle) < 0.02
        else:
            apart = abs(hue(middle) - hue(np.array(COLORS[color]) / 255))
            assert min(apart, 1 - apart) < 0.04, name
        assert np.ptp(picture[:4].mean(axis=(0, 1))) < 8  # the ground around it
    assert portrait("red ball") is None
