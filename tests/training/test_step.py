"""A step: what it changes, and what becomes of steps with NaN or infinite gradients."""

import functools
from dataclasses import replace

import pytest
import torch
from conftest import error_of, train_argv
from runs import auto, poison, records, stopped

import train
from diffusion.samplers import make_scheduler
from network.checkpoint import load_checkpoint
from training import trainer
from training.noise_levels import NoiseLevels
from training.recipes import RECIPES
from training.run_folder import checkpoints, latest_checkpoint
from training.step import build_state, draw_randomness, train_step, update_ema


def test_a_step_with_nan_is_skipped_and_counted(world, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2})
    kept = []
    real_step = trainer.train_step

    def everything(state):
        """Weights, and the optimiser's moments and step counts (none before the first step)."""
        moments = [v.clone() for values in state.optimizer.state.values() for v in values.values()]
        return [p.detach().clone() for p in state.model.parameters()], moments

    def watched(state, *args):
        before = everything(state)
        result = real_step(state, *args)
        after = everything(state)
        kept.append(
            [len(a) == len(b) and all(map(torch.equal, a, b))
             for a, b in zip(before, after, strict=True)]
        )  # fmt: skip
        return result

    monkeypatch.setattr(trainer, "train_step", watched)
    path = train.main(train_argv(world, tmp_path, "--epochs", 2, "--lr_warmup_steps", 0))
    assert kept == [[False] * 2] + [[True] * 2] * 2 + [[False] * 2] * 3
    lines = [r for r in records(tmp_path / "r") if "skipped_steps" in r]
    assert [r["skipped_steps"] for r in lines] == [0, 1, 2, 2, 2, 2]
    assert ["loss" in r for r in lines] == [True, False, False, True, True, True]
    weights = load_checkpoint(path)
    assert all(v.isfinite().all() for v in [*weights.model.values(), *weights.ema.values()])
    assert weights.training["skipped"].tolist() == [2, 0]


def test_a_skipped_last_step_ends_the_run_as_any_other(world, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    checkpoint = load_checkpoint(train.main(train_argv(world, tmp_path, "--epochs", 1)))
    assert checkpoint.step == 3 and checkpoint.training["skipped"].tolist() == [1, 1]


def test_many_nan_in_a_row_stop_with_the_last_good_checkpoint(world, tmp_path):
    argv = train_argv(world, tmp_path, "--epochs", 9, "--save_interval", 1)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, range(4, 100))
        message = error_of(train.main, [*argv, "--max_skipped_steps", 4])
    assert "the last 4 steps before step 8 had NaN" in message
    assert "model_epoch_1.pth" in message  # none is written within the streak
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 3
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, range(5))  # steps 4 to 8: past the end of epoch 2
        train.main([*auto(tmp_path), "--max_skipped_steps", "9", "--save_interval", "2"])
    assert [path.name for path in checkpoints(tmp_path / "r")] == [
        f"model_epoch_{epoch}.pth" for epoch in (1, 3, 4, 6, 8, 9)
    ]  # that of epoch 2 was put off


def test_the_count_of_skipped_steps_goes_on_when_resumed(world, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 10**6))
    argv = train_argv(world, tmp_path, "--epochs", 9, "--max_skipped_steps", 4)
    stopped(train.main, argv, after=6)
    assert "the last 4 steps before step 8 had NaN" in error_of(train.main, auto(tmp_path))


def test_diverged_training_stops_and_saves_nothing(world, tmp_path):
    argv = train_argv(world, tmp_path, "--epochs", 4, "--lr", 1e30, "--weight_decay", 0,
                      "--lr_warmup_steps", 0, "--save_interval", 1)  # fmt: skip
    message = error_of(train.main, argv)
    assert "had NaN or infinite gradients" in message and "--lr" in message
    assert latest_checkpoint(tmp_path / "r") is None


def test_gradients_are_clipped(world, tmp_path, monkeypatch):
    """With a tiny limit, SGD's step is as long as the limit times the learning rate."""
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, lr, *_, **__: torch.optim.SGD(p, lr, fused=True)
    )
    moves = []
    real_step = trainer.train_step

    def measure(state, *args):
        before = [p.detach().clone() for p in state.model.parameters()]
        lr = state.lr_scheduler.get_last_lr()[0]
        result = real_step(state, *args)
        move = sum(
            (p - q).square().sum() for p, q in zip(state.model.parameters(), before, strict=True)
        )
        moves.append((move.sqrt().item(), lr))
        return result

    monkeypatch.setattr(trainer, "train_step", measure)
    train.main(train_argv(world, tmp_path, "--epochs", 1, "--max_grad_norm", 0.01, "--lr", 1.0,
                          "--lr_warmup_steps", 0))  # fmt: skip
    for move, lr in moves:
        assert move == pytest.approx(0.01 * lr, rel=0.05)


def test_every_picture_counts_by_its_noise_level(monkeypatch):
    """The gradient of a step is the weights', the loss that is reported is not."""
    model = replace(
        RECIPES["tiny"].model, image_size=16, block_out_channels=(8, 8), norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    config = replace(RECIPES["tiny"], model=model, optimizer="adamw")
    x_0, labels = torch.rand(4, 3, 16, 16), torch.eye(24)[:4]

    def step(weights):
        monkeypatch.setattr(NoiseLevels, "weights", lambda _, t: weights)
        state = build_state(config, 10, torch.device("cpu"))
        loss, norm = train_step(state, config, make_scheduler(config.noise), x_0, labels, None)
        assert state.levels.means.sum() > 0
        return loss.item(), norm.item()

    (loss, norm), (same, tripled) = step(torch.ones(4)), step(torch.full((4,), 3.0))
    assert same == loss and tripled == pytest.approx(3 * norm, rel=1e-4)
    assert step(torch.tensor([1.0, 0, 0, 0]))[1] != pytest.approx(norm, rel=1e-2)


def test_timesteps_are_drawn_as_the_settings_say():
    config = replace(RECIPES["tiny"], timestep_interval=(0.5, 0.6))
    t, _, _ = draw_randomness(config, 0, 200, torch.zeros(1, 3, 8, 8))
    total = config.noise.num_train_timesteps
    assert ((t >= 0.5 * total) & (t < 0.6 * total)).sum() == pytest.approx(110, abs=2)


def test_ema_update():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * a.weight + 0.1 * b.weight
    update_ema(a, b, 0.9)
    torch.testing.assert_close(a.weight, expected)


def test_a_compiled_network_trains_the_same(world, tmp_path, monkeypatch):
    plain = load_checkpoint(train.main(train_argv(world, tmp_path / "a", "--epochs", 1)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    argv = train_argv(world, tmp_path / "b", "--epochs", 1, "--compile")
    compiled = load_checkpoint(train.main(argv))
    assert compiled.model.keys() == plain.model.keys()
    for name, value in plain.model.items():
        torch.testing.assert_close(compiled.model[name], value)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", no_compiler)
    argv = train_argv(world, tmp_path / "c", "--epochs", 1, "--compile")
    assert "--compile: torch.compile fails here (no compiler found)" in error_of(train.main, argv)
    assert not (tmp_path / "c").exists()
