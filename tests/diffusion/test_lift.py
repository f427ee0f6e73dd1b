"""Pictures weighed by the network itself, and the best of several kept."""

from dataclasses import replace

import pytest
import torch
from conftest import LinearModel

from diffusion.lift import LEVELS, NUM_NOISES, left_out, lift
from diffusion.samplers import make_scheduler
from diffusion.sampling import evaluations, sample
from diffusion.schedule import scale
from runtime.seeds import derive_seed, picture_seeds
from runtime.settings import SamplingConfig, SchedulerConfig

NOISE = SchedulerConfig(num_train_timesteps=20)
FLOAT = SamplingConfig(
    scheduler="ddim", num_inference_steps=5, mixed_precision="no", guidance_scale=2.5
)


def labels_of(*sets):
    labels = torch.zeros(len(sets), 24)
    for row, objects in zip(labels, sets, strict=True):
        row[list(objects)] = 1
    return labels


def test_every_object_is_left_out_once():
    without, rows = left_out(labels_of({3, 8, 20}, {5}))
    assert rows.tolist() == [0, 0, 0, 1]
    assert torch.equal(without, labels_of({8, 20}, {3, 20}, {3, 8}, set()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_lift_equals_the_difference_of_losses_by_hand(kind):
    torch.manual_seed(0)
    noise = replace(NOISE, prediction_type=kind)
    model, y, x_0 = LinearModel(), labels_of({3, 8, 20}, {5, 9}), torch.randn(2, 3, 8, 8)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    found = lift(model, noise, x_0, y, generators, "no")
    alpha_bar = make_scheduler(noise).alphas_cumprod
    for n, objects in enumerate(({3, 8, 20}, {5, 9})):
        generator = torch.Generator().manual_seed(n + 1)
        differences = dict.fromkeys(objects, 0.0)
        for level in torch.linspace(*LEVELS, NUM_NOISES) * 19:
            t = int(level)
            a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
            eps = torch.randn(1, 3, 8, 8, generator=generator)
            x_t = a * x_0[n : n + 1] + s * eps
            target = {"epsilon": eps, "sample": x_0[n : n + 1],
                      "v_prediction": a * eps - s * x_0[n : n + 1]}[kind]  # fmt: skip
            whole = (target - model(x_t, t, labels_of(objects))).square().mean()
            for k in objects:
                part = (target - model(x_t, t, labels_of(objects - {k}))).square().mean()
                differences[k] += (part - whole).item() / NUM_NOISES
        assert abs(found[n] - min(differences.values())) < 1e-5


def test_the_picture_with_the_highest_lift_is_kept_in_any_batch():
    model, y, seeds = LinearModel(), labels_of({1}, {2, 9}, {3, 11, 17}), picture_seeds(0, 3)
    candidates = []
    for k in range(4):
        these = [s if k == 0 else derive_seed(s, 4, k) for s in seeds]
        images, _ = sample(model, NOISE, y, these, FLOAT, progress=False)
        generators = [torch.Generator().manual_seed(derive_seed(s, 5, 0)) for s in these]
        candidates.append((images, lift(model, NOISE, scale(images, NOISE), y, generators, "no")))
    scores = torch.stack([score for _, score in candidates])  # (4, 3)
    best = scores.argmax(dim=0)
    assert best.any()  # not only the first ones
    for batch_size in (1, 5, 64):
        config = replace(FLOAT, best_of=4, batch_size=batch_size)
        images, kept = sample(model, NOISE, y, seeds, config, 3, progress=False)
        for n in range(3):
            torch.testing.assert_close(images[n], candidates[best[n]][0][n])
            torch.testing.assert_close(kept[-1, n], images[n])


def test_drawing_and_weighing_are_counted():
    model, y = LinearModel(), labels_of({1}, {2, 9})
    config = replace(FLOAT, best_of=3)
    sample(model, NOISE, y, [1, 2], config, progress=False)
    assert sum(model.calls) / 2 == evaluations(NOISE, config, y) == 3 * (10 + NUM_NOISES * 2.5)
