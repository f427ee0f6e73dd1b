"""Losses divided by their running mean at the noise level."""

import pytest
import torch

from training.noise_levels import DECAY, LEVELS, NoiseLevels


def test_every_level_counts_the_same():
    levels, t = NoiseLevels(100), torch.arange(100)
    assert torch.equal(levels.weights(t), torch.ones(100))  # nothing is known yet
    losses = 0.01 * (1 + t)
    levels.update(t, losses)
    weighted = (losses * levels.weights(t)).view(LEVELS, -1).mean(dim=1)
    torch.testing.assert_close(weighted, torch.full((LEVELS,), losses.mean().item()))
    torch.testing.assert_close(levels.means, losses.view(LEVELS, -1).mean(dim=1))


def test_means_follow_the_losses_and_keep_what_is_not_seen():
    levels = NoiseLevels(100)
    levels.update(torch.tensor([3, 99]), torch.tensor([1.0, 5.0]))
    levels.update(torch.tensor([0, 2]), torch.tensor([2.0, 4.0]))
    assert levels.means[0].item() == pytest.approx(DECAY**2 + (1 - DECAY**2) * 3)
    assert levels.means[-1] == 5 and not levels.means[1:-1].any()
    weights = levels.weights(torch.tensor([0, 50, 99]))
    mean = (levels.means[0].item() + 5) / 2
    assert weights.tolist() == pytest.approx([mean / levels.means[0].item(), 1, mean / 5])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_loss_changes_nothing_at_its_level(bad):
    levels = NoiseLevels(100)
    levels.update(torch.tensor([0, 99]), torch.tensor([1.0, 5.0]))
    levels.update(torch.tensor([0, 99]), torch.tensor([bad, 5.0]))
    assert levels.means[[0, -1]].tolist() == [1, 5]
