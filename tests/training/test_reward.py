"""Learning from a classifier's opinion of what the network draws."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import OBJECTS, LinearModel, error_of, train_argv

import train
from diffusion.guidance import guided_prediction
from diffusion.samplers import make_scheduler
from diffusion.schedule import unscale
from judging.evaluator import load_evaluator
from network.checkpoint import load_checkpoint
from runtime.seeds import derive_seed
from runtime.settings import (
    ROOT,
    ModelConfig,
    RewardConfig,
    SchedulerConfig,
    TrainConfig,
    UserError,
)
from training.reward import Reward, half_differentiated
from training.step import build_state, train_step

NOISE = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing",
                        num_train_timesteps=20, scaling_factor=2.0)  # fmt: skip
CONFIG = TrainConfig(
    model=ModelConfig(image_size=8), noise=NOISE, seed=5,
    reward=RewardConfig(reward_batch_size=6, reward_steps=4),
)  # fmt: skip
LABELS = torch.eye(24)[:3]


class Guide:
    """Likes pictures that are as bright as the number of the first object says."""

    def __init__(self):
        self.seen = []

    def log_likelihood(self, images, labels):
        self.seen.append((images, labels))
        return -(images.mean(dim=(1, 2, 3)) - labels.argmax(dim=1) / 24).square()


@pytest.fixture
def plain(monkeypatch):
    """A Reward whose classifier sees pictures as they are."""
    monkeypatch.setattr(Reward, "disturbed", lambda self, images, step: images)
    return Reward(Guide(), CONFIG, torch.device("cpu"))


def drawn_by_hand(model, label, first_step, number):
    """The x_0_hat of all four steps of picture `number`, begun at `first_step`: (24,) label."""
    scheduler = make_scheduler(NOISE)
    scheduler.set_timesteps(4)
    found = []
    for k, t in enumerate(scheduler.timesteps):
        seed = derive_seed(5, 6, (first_step + k) * 6 + number)
        generator = torch.Generator().manual_seed(seed)
        if k == 0:
            x_t = torch.randn(1, 3, 8, 8, generator=generator)
        prediction = guided_prediction(model, x_t, t, label[None], 3.0)
        result = scheduler.step(prediction, t, x_t, generator=generator)
        found.append(unscale(result.pred_original_sample[0], NOISE))
        x_t = result.prev_sample
    return found


def test_pictures_are_drawn_step_by_step_each_at_another_stage(plain):
    """Picture 0 begins with step 0; 1 and 4 are a step or three ahead and begin later."""
    model, labels = LinearModel(), LABELS
    seen = []
    with torch.no_grad():
        for step in range(4):
            plain.loss(model, labels, step, None)
            images, conditions = plain.guide.seen[-1]
            seen.append(images)
    assert plain.offsets.tolist() == [0, 0, 1, 2, 2, 3]
    assert [len(images) for images in seen] == [2, 3, 5, 6]  # each begins at its stage 0
    with torch.no_grad():
        by_hand = drawn_by_hand(model, conditions[1], 0, 1)
    for images, expected in zip(seen, by_hand, strict=True):
        torch.testing.assert_close(images[1], expected)
    with torch.no_grad():  # the next ones
        plain.loss(model, labels, 4, None)
        images, conditions = plain.guide.seen[-1]
        by_hand = drawn_by_hand(model, conditions[1], 4, 1)
    torch.testing.assert_close(images[1], by_hand[0])


def test_loss_is_the_mean_of_minus_log_likelihoods(plain):
    model = LinearModel()
    loss = plain.loss(model, LABELS, 0, None)
    images, labels = plain.guide.seen[0]
    expected = (images.mean(dim=(1, 2, 3)) - labels.argmax(dim=1) / 24).square().sum() / 6
    torch.testing.assert_close(loss, expected)
    assert torch.equal(plain.last, loss.detach())


def test_gradient_goes_through_one_conditional_prediction(plain):
    """Of (1 - w) uncond + w cond only the second has one, and none comes from earlier steps."""
    model = LinearModel()
    for step in range(2):
        loss = plain.loss(model, LABELS, step, None)
    (gradient,) = torch.autograd.grad(loss, model.w)
    # By hand: x_0_hat = alpha x_t - sigma v, brightness's derivative is -3 sigma / 2 by v_cond.
    images, labels = plain.guide.seen[1]
    scheduler = plain.scheduler
    stages = [1, 1, 0]  # pictures 0 and 1 take their second step, 2 its first
    expected = torch.zeros(24, 3)
    for image, label, stage in zip(images.detach(), labels, stages, strict=True):
        sigma = (1 - scheduler.alphas_cumprod[scheduler.timesteps[stage]]).sqrt()
        off = image.mean() - label.argmax() / 24
        expected[label.argmax()] += 2 * off * (-3 * sigma / 2) / 3 / 6
    torch.testing.assert_close(gradient, expected)


def test_half_differentiated_gives_what_the_network_gives():
    model = LinearModel()
    x, t, y = torch.randn(4, 3, 8, 8), torch.arange(4), torch.cat([torch.zeros(2, 24), LABELS[:2]])
    out = half_differentiated(model)(x, t, y)
    torch.testing.assert_close(out, model(x, t, y))
    (gradient,) = torch.autograd.grad(out.sum(), model.a)
    torch.testing.assert_close(gradient, x[2:].sum())


def test_classifier_sees_disturbed_pictures_with_gradient():
    reward = Reward(Guide(), CONFIG, torch.device("cpu"))
    loss = reward.loss(LinearModel(), LABELS, 0, None)
    images, _ = reward.guide.seen[0]
    again = Reward(Guide(), CONFIG, torch.device("cpu"))
    again.disturbed = lambda images, step: images
    again.loss(LinearModel(), LABELS, 0, None)
    assert not torch.allclose(images, again.guide.seen[0][0], atol=0.02)
    assert loss.requires_grad


def test_conditions_of_more_objects_come_more_often(plain):
    labels = torch.zeros(4, 24)
    labels[0, 0] = labels[1, :3] = 1  # pictures 2 and 3 hold nothing
    taken = []
    for step in range(0, 400, 4):
        plain.loss(LinearModel(), labels, step, None)
        taken += plain.labels[:2].sum(dim=1).tolist()
    assert 0.8 < taken.count(3) / len(taken) < 0.98 and taken.count(1) + taken.count(3) == 200


class Judgement:
    """Finds pictures of object 0 right and all others wrong."""

    def log_likelihood(self, images, labels):
        return torch.where(labels[:, 0] > 0, -0.5, -1.0) + 0 * images.sum()


def test_missed_conditions_are_drawn_again():
    """From other noise, until the classifier finds them; how often is up to chance."""
    again = {}
    for retry in (0.0, 0.75):
        config = replace(CONFIG, reward=replace(CONFIG.reward, reward_retry=retry))
        reward = Reward(Judgement(), config, torch.device("cpu"))
        numbers, noise = [], []
        for step in range(600):
            reward.loss(LinearModel(), torch.eye(24)[:2], step, None)
            if step % 4 == 0:  # picture 0 has begun
                numbers.append(int(reward.labels[0].argmax()))
                noise.append(reward.x_t[0].clone())
        assert not any(torch.equal(before, after) for before, after in pairwise(noise))
        for first in (0, 1):
            same = [after == first for before, after in pairwise(numbers) if before == first]
            again[retry, first] = sum(same) / len(same)
    # A new condition is the same one in half of the cases.
    assert all(0.35 < again[case] < 0.65 for case in ((0.0, 0), (0.0, 1), (0.75, 0)))
    assert 0.78 < again[0.75, 1] < 0.97


def test_classifier_is_asked_in_the_interval_only(plain):
    """Of 20 timesteps the four steps are at 19, 14, 9 and 4; pictures are drawn all the same."""
    model, config = LinearModel(), replace(CONFIG.reward, reward_interval=(0.4, 0.8))
    part = Reward(plain.guide, replace(CONFIG, reward=config), torch.device("cpu"))
    for step in range(4):
        plain.loss(model, LABELS, step, None)
        differentiated = []
        model.register_forward_pre_hook(
            lambda _, inputs, rows=differentiated: rows.append(len(inputs[0]))
            if torch.is_grad_enabled() else None
        )  # fmt: skip
        loss = part.loss(model, LABELS, step, None)
        torch.testing.assert_close(part.x_t, plain.x_t)
    images, labels = plain.guide.seen[-1]
    off = (images.mean(dim=(1, 2, 3)) - labels.argmax(dim=1) / 24).square()
    stages = (3 + plain.offsets) % 4
    assert part.scheduler.timesteps.tolist() == [19, 14, 9, 4]
    asked = int(((stages == 1) | (stages == 2)).sum())
    assert 0 < asked < 6
    assert sum(differentiated) == asked  # no work in vain
    torch.testing.assert_close(loss, off[:asked].sum() / 6)  # those that are asked come first
    never = replace(CONFIG.reward, reward_interval=(0.5, 0.6))
    with pytest.raises(UserError, match="--reward_interval 0.5 0.6: none of the 4 steps"):
        Reward(plain.guide, replace(CONFIG, reward=never), torch.device("cpu"))


def test_training_pleases_the_classifier(trained, tmp_path):
    """Its opinion of what the network draws rises, beyond that of a network trained without."""
    data, _, _ = trained
    file = ROOT / "data" / "standin" / "evaluator.pth"  # not the judge of this data
    argv = train_argv(data, tmp_path, "--epochs", 30, "--lr", 3e-3, "--lr_warmup_steps", 0)
    rewarded = ["--reward_model", str(file), "--reward_weight", "0.1", "--reward_steps", "5",
                "--reward_batch_size", "8"]  # fmt: skip
    checkpoints = [
        load_checkpoint(train.main([*argv, *more, "--run_name", name]))
        for name, more in (("plain", []), ("rewarded", rewarded))
    ]
    config = checkpoints[1].config
    evaluator = load_evaluator(file, OBJECTS)
    opinions = []
    for checkpoint in checkpoints:
        state = build_state(config, 1, torch.device("cpu"), None, evaluator)
        state.model.load_state_dict(checkpoint.model)
        with torch.no_grad():
            losses = [state.reward.loss(state.model, torch.eye(24), s, None) for s in range(9)]
        opinions.append(sum(losses).item())
    assert opinions[1] < 0.9 * opinions[0]
    assert "reward_loss" in (tmp_path / "rewarded" / "metrics.jsonl").read_text()


def test_skipped_reward_leaves_the_step_as_it_is():
    """Until a picture has begun, the step is the one without a classifier."""
    config = replace(CONFIG, model=ModelConfig(
        image_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ), lr_warmup_steps=0)  # fmt: skip
    weights = []
    for guide in (None, Guide()):
        state = build_state(config, 10, torch.device("cpu"), None, guide)
        state.step = 1
        if state.reward:
            state.reward.offsets[:] = 0
        x_0 = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        train_step(state, config, make_scheduler(NOISE), x_0, LABELS, None)
        weights.append(torch.cat([p.flatten() for p in state.model.parameters()]))
    assert torch.equal(*weights)


def test_the_judge_gives_no_rewards(trained, tmp_path):
    data, _, _ = trained
    argv = train_argv(data, tmp_path, "--reward_steps", 5)
    message = error_of(train.main, [*argv, "--reward_model", data / "evaluator.pth"])
    assert "--reward_model" in message and "is the judge itself" in message
    message = error_of(train.main, [*argv, "--reward_model", tmp_path / "none.pth"])
    assert "none.pth" in message
    argv += ["--reward_model", tmp_path / "none.pth"]
    message = error_of(train.main, [*argv, "--reward_guidance_scale", 0])
    assert "--reward_guidance_scale 0: draws without the condition" in message
    message = error_of(train.main, [*argv, "--reward_steps", 7])
    assert "--reward_steps 7: does not divide the 20 trained timesteps" in message
