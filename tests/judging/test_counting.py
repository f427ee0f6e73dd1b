"""What stands there twice, by its color."""

from types import SimpleNamespace

import torch
from conftest import OBJECTS

from iclevr.labels import encode_labels
from judging.counting import HUES, color_of, too_many
from judging.evaluator import evaluate, judge_scores
from judging.metrics import record, summarise

RED, BROWN, YELLOW, GRAY = (0.5, 0.3, 0.3), (0.5, 0.41, 0.3), (0.6, 0.58, 0.3), (0.3, 0.3, 0.3)
ASKED = ["red cube", "brown sphere"]
ONCE = (RED, 10, 10, 6), (BROWN, 40, 40, 6)
TWICE = (RED, 10, 10, 6), (RED, 10, 30, 6), (RED, 30, 10, 6), (BROWN, 40, 40, 6)


def scene(*squares):
    """(3, 64, 64), gray ground with squares: (colour in [0, 1], y, x, side)."""
    image = torch.full((3, 64, 64), 0.45)
    for color, y, x, side in squares:
        image[:, y : y + side, x : x + side] = torch.tensor(color)[:, None, None]
    return image * 2 - 1


def count(image, names):
    return too_many(image[None], encode_labels(names, OBJECTS)[None], OBJECTS).item()


def test_blobs_of_a_color_beyond_those_asked_for_are_counted():
    once, twice = scene(*ONCE), scene(*TWICE)
    assert count(once, ASKED) == 0
    assert count(once, [*ASKED, "red sphere"]) == 0  # one is missing
    assert count(twice, ASKED) == 2
    assert count(twice, [*ASKED, "red sphere"]) == 1
    assert count(twice[:, ::2, ::2], ASKED) == 2
    both = scene((BROWN, 10, 10, 6), (YELLOW, 40, 10, 6), (YELLOW, 40, 40, 6))
    assert count(both, ["brown cube", "yellow cube"]) == 1


def test_what_touches_is_one_and_gray_and_specks_are_none():
    touching = scene((RED, 10, 10, 6), (RED, 16, 16, 6), (GRAY, 40, 10, 6), (GRAY, 40, 40, 6))
    assert count(touching, ["red cube", "gray cube"]) == 0
    assert count(touching, ["gray cube"]) == 0
    specks = scene((RED, 10, 10, 6), (RED, 40, 40, 3), (YELLOW, 40, 10, 6))
    assert count(specks, ["red cube", "yellow cube"]) == 0


def test_colors_that_no_hue_is_known_of_are_left_out():
    assert {color_of(name) for name in OBJECTS} == {*HUES, None}
    assert color_of("gray cube") is None and color_of("plane") is None
    labels = torch.ones(1, 1)
    assert too_many(scene(*TWICE)[None], labels, {"plane": 0}).item() == 0


def test_exact_once_is_exact_and_nothing_twice():
    """Of four pictures: right, twice, not exact, both."""
    images = torch.stack([scene(*ONCE), scene(*TWICE)] * 2)
    labels = encode_labels(ASKED, OBJECTS).repeat(4, 1)
    scores = labels.clone()
    scores[2:, OBJECTS["brown sphere"]] = 0
    judge = SimpleNamespace(scores=lambda _: scores, threshold=0.5, objects=OBJECTS)
    found = evaluate(judge, images, labels)
    assert found.too_many.tolist() == [0, 2, 0, 2]
    assert found.exact.tolist() == [1, 1, 0, 0] and found.once.tolist() == [1, 0, 0, 0]
    figures = summarise([record(found)])
    assert figures["exact_sets"].mean == 0.5 and figures["exact_once"].mean == 0.25
    assert judge_scores(scores, labels, 0.5, OBJECTS).once.tolist() == [1, 1, 0, 0]
