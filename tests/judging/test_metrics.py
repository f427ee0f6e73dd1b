"""Metrics beside the course's accuracy, on constructed cases and against libraries."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OBJECTS, SRC
from scipy import linalg, stats

from diffusion.guidance import classifier_guidance
from diffusion.samplers import make_scheduler
from diffusion.schedule import unscale
from judging.evaluator import Evaluator, build_evaluator, calibrate, judge_scores
from judging.intervals import Interval
from judging.metrics import count_interval, paired_difference, record, summarise
from judging.realism import Reference, draw_conditions, frechet_distance, nearest
from runtime.settings import SchedulerConfig

NAMES = list(OBJECTS)


def judged(asked: list[list[str]], found: list[list[str]]):
    labels, scores = torch.zeros(2, len(asked), 24)
    for row, names in enumerate(asked):
        labels[row, [OBJECTS[name] for name in names]] = 1
    for row, names in enumerate(found):
        scores[row, [OBJECTS[name] for name in names]] = 0.9
    return judge_scores(scores, labels, 0.5, OBJECTS)


def counts(result):
    return {
        name: getattr(result, name).tolist()
        for name in ("correct", "exact", "missing", "extra", "color_errors", "shape_errors")
    }


def test_an_extra_object_costs_the_exact_set_but_not_the_courses_accuracy():
    asked = ["red sphere", "cyan cube"]
    result = judged([asked], [[*asked, "gray cylinder"]])
    assert counts(result) == {
        "correct": [2], "exact": [0], "missing": [0], "extra": [1],
        "color_errors": [0], "shape_errors": [0],
    }  # fmt: skip
    assert result.accuracy == 1
    assert result.confusion[24, OBJECTS["gray cylinder"]] == 1


@pytest.mark.parametrize(
    ("found", "color", "shape"),
    [("blue sphere", 1, 0), ("red cube", 0, 1), ("blue cube", 1, 1), (None, 0, 0)],
)
def test_swapped_and_missing_objects(found, color, shape):
    result = judged([["red sphere", "cyan cube"]], [["cyan cube", *([found] if found else [])]])
    assert counts(result) == {
        "correct": [1], "exact": [0], "missing": [1],
        "extra": [int(found is not None)], "color_errors": [color], "shape_errors": [shape],
    }  # fmt: skip
    column = OBJECTS[found] if found else 24
    assert result.confusion[OBJECTS["red sphere"], column] == 1
    assert result.confusion[OBJECTS["cyan cube"], OBJECTS["cyan cube"]] == 1
    assert result.confusion.sum() == 2


def test_errors_are_matched_so_that_pairs_share_what_they_can():
    result = judged(
        [["red sphere", "blue cube"]], [["yellow cube", "red cylinder"]]
    )  # blue cube -> yellow cube, red sphere -> red cylinder
    assert (result.color_errors.item(), result.shape_errors.item()) == (1, 1)
    assert result.confusion[OBJECTS["blue cube"], OBJECTS["yellow cube"]] == 1


def test_a_score_at_the_threshold_counts_and_ties_are_settled_by_index():
    labels, scores = torch.zeros(2, 1, 24)
    labels[0, 3] = 1
    scores[0, [2, 3]] = 0.5
    result = judge_scores(scores, labels, 0.5, OBJECTS)
    assert result.detected[0].nonzero().flatten().tolist() == [2, 3]
    assert counts(result)["correct"] == [0] and counts(result)["extra"] == [1]


def test_calibration_finds_the_gap_between_right_and_wrong_scores():
    labels = torch.zeros(50, 24)
    labels[range(50), torch.arange(50) % 24] = 1
    scores = torch.where(labels.bool(), 0.3, 0.05)  # 0.5 would find nothing
    threshold = calibrate(scores, labels)
    assert 0.05 < threshold <= 0.3
    assert ((scores >= threshold) == labels.bool()).all()
    # The middle in log-odds of all that are equally good.
    middle = torch.tensor([0.05, 0.3]).logit().mean().sigmoid().item()
    assert threshold == pytest.approx(middle, abs=0.02)


def test_summary_of_one_and_of_several_draws():
    asked = [["red sphere"], ["red sphere", "cyan cube"], ["cyan cube", "gray cube"]]
    good = record(judged(asked, asked))
    bad = record(judged(asked, [["red sphere"], ["red sphere"], ["cyan cube", "brown cube"]]))
    one = summarise([bad])
    wilson = stats.binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert vars(one["accuracy"]) == pytest.approx(
        {"mean": 3 / 5, "low": wilson.low, "high": wilson.high}
    )
    assert one["exact_sets"].mean == pytest.approx(1 / 3)
    assert one["missing"].mean == pytest.approx(2 / 3) and one["extra"].mean == pytest.approx(1 / 3)
    assert one["accuracy_1"].mean == 1 and one["accuracy_2"].mean == pytest.approx(2 / 4)
    several = summarise([good, bad, bad])
    t = stats.ttest_1samp([1, 3 / 5, 3 / 5], 0).confidence_interval()
    assert several["accuracy"].mean == pytest.approx((1 + 6 / 5) / 3)
    assert several["accuracy"].low == pytest.approx(max(t.low, 0))
    assert several["accuracy"].high == pytest.approx(min(t.high, 1))
    difference = paired_difference([good, good], [bad, bad], "accuracy")
    assert difference.mean == pytest.approx(2 / 5)


def test_count_intervals():
    t = stats.ttest_1samp([0, 1, 1, 2], 0).confidence_interval()
    assert count_interval(np.array([[0, 1, 1, 2]])).high == pytest.approx(t.high)
    assert count_interval(np.array([[0, 0], [2, 2]])).low == 0
    assert count_interval(np.array([[3]])) == Interval(3, None, None)


def test_frechet_distance_equals_the_formula():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=g)
    b = torch.randn(400, 6, generator=g) @ torch.randn(6, 6, generator=g) + 0.5
    x, y = a.double().numpy(), b.double().numpy()
    c1, c2 = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(c1 @ c2).real
    formula = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(formula, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_features_are_what_the_last_layer_sees():
    torch.manual_seed(0)
    model = build_evaluator().eval()
    judge = Evaluator(model, "any", None, OBJECTS)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(model.fc(judge.features(images)), judge.scores(images))
    labels = torch.eye(24)[:3]
    likelihood = torch.distributions.Bernoulli(judge.scores(images)).log_prob(labels).sum(1)
    torch.testing.assert_close(judge.log_likelihood(images, labels), likelihood)


def reference(count=5):
    g = np.random.default_rng(0)
    images = g.integers(0, 256, (count, 3, 64, 64), dtype=np.uint8)
    return Reference(images, torch.eye(24)[:count], judge=None, key="", cache_dir=Path())


def test_nearest_finds_copies_mirrored_ones_too():
    ref = reference()
    pictures = torch.from_numpy(ref.images).float() / 127.5 - 1
    queries = torch.stack([pictures[3], pictures[1].flip(-1), (pictures[2] * 0.9)])
    found, rms = nearest(queries, ref)
    torch.testing.assert_close(found, torch.stack([pictures[3], pictures[1].flip(-1), pictures[2]]))
    assert rms[:2].abs().max() < 1e-3
    expected = (pictures[2] * 0.1).square().mean().sqrt() * 127.5
    assert rms[2] == pytest.approx(expected.item(), rel=1e-4)


def test_conditions_are_those_of_training_pictures():
    labels = draw_conditions(reference(), 200, 0)
    assert labels.shape == (200, 24) and (labels.argmax(1) < 5).all()
    assert set(labels.argmax(1).tolist()) == {0, 1, 2, 3, 4}
    assert not torch.equal(labels, draw_conditions(reference(), 200, 1))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_by_the_judge_moves_x_0_along_the_gradient(kind):
    """Whatever is predicted, x_0_hat moves by s sigma^2 times the gradient."""

    class Quadratic:  # log p = sum of a * x, so that the gradient is a
        def log_likelihood(self, images, labels):
            return (0.25 * images).sum(dim=(1, 2, 3))

    noise = SchedulerConfig(prediction_type=kind, scaling_factor=2.0, shift_factor=0.1)
    scheduler, t = make_scheduler(noise, "ddim"), torch.tensor(120)
    prediction, x_t = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def x_0(prediction):
        scheduler.set_timesteps(500)
        return scheduler.step(prediction, t, x_t).pred_original_sample

    guided = classifier_guidance(
        prediction, x_t, t, torch.zeros(1, 24), scheduler, noise, Quadratic(), 3.0
    )
    variance = 1 - scheduler.alphas_cumprod[t]
    # d/dx_0 of log p(unscale(x_0)) = a / scaling_factor
    expected = (3 * variance * 0.25 / 2).expand(1, 3, 8, 8)
    torch.testing.assert_close(x_0(guided) - x_0(prediction), expected, atol=1e-4, rtol=1e-4)
    assert unscale(torch.tensor(2.0), noise) == pytest.approx(1.1)


def test_a_notebooks_backend_is_none_of_ours():
    """Colab sets it for every command in a cell; here it is not installed."""
    code = "import judging.realism; from judging.figures import plt; print(plt.get_backend())"
    backend = "module://matplotlib_inline.backend_inline"
    env = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "agg\n", done.stderr
