"""Muon against torch's on matrices, AdamW against torch's on the rest."""

import copy

import pytest
import torch
from torch import nn

from network.model import DiffusionModel
from runtime.settings import TrainConfig
from training.optimizer import Muon, make_optimizer, orthogonalized
from training.recipes import RECIPES

BETAS = (0.9, 0.99)


def steps_of(optimizer, weights, gradients):
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [w.detach() for w in weights]


def copies(tensors):
    return [nn.Parameter(t.clone()) for t in tensors]


def test_matrices_move_as_torchs_muon_moves_them():
    torch.manual_seed(0)
    start = [torch.randn(8, 20), torch.randn(20, 8), torch.randn(8, 20)]
    gradients = [[torch.randn_like(w) for w in start] for _ in range(4)]
    ours, theirs = copies(start), copies(start)
    steps_of(Muon(ours, [], 0.01, BETAS, 0.1), ours, gradients)
    torchs = torch.optim.Muon(theirs, 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    steps_of(torchs, theirs, gradients)
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert moved > 0.05 and (a - b).norm() < 0.04 * moved  # bfloat16 on either side


def test_a_convolution_is_a_matrix_of_its_outputs():
    torch.manual_seed(0)
    kernel, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Parameter(kernel.clone(memory_format=layout))
        matrix = nn.Parameter(kernel.flatten(1).clone())
        steps_of(Muon([conv], [], 0.01, BETAS, 0.1), [conv], [[gradient]])
        steps_of(Muon([matrix], [], 0.01, BETAS, 0.1), [matrix], [[gradient.flatten(1)]])
        torch.testing.assert_close(conv.flatten(1), matrix)


def test_the_rest_moves_as_adamw_moves_it():
    torch.manual_seed(0)
    start = [torch.randn(5), torch.randn(3, 4)]
    gradients = [[torch.randn_like(w) for w in start] for _ in range(4)]
    ours, theirs = copies(start), copies(start)
    steps_of(Muon([], ours, 0.01, BETAS, 0.1), ours, gradients)
    steps_of(torch.optim.AdamW(theirs, 0.01, BETAS, weight_decay=0.1), theirs, gradients)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 100), (2, 100, 16)])
def test_orthogonalized_singular_values_are_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalized(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    alike = torch.cosine_similarity(result.flatten(1), (u @ v).flatten(1))
    assert alike.min() > 0.95


def test_a_step_with_nan_leaves_everything_as_it_is():
    torch.manual_seed(0)
    weights = copies([torch.randn(4, 6), torch.randn(5)])
    optimizer = Muon(weights[:1], weights[1:], 0.01, BETAS, 0.1)
    optimizer.found_inf = torch.tensor(0.0)
    good = [torch.randn_like(w) for w in weights]
    steps_of(optimizer, weights, [good])
    before = copy.deepcopy((weights, optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.tensor(1.0)
    steps_of(optimizer, weights, [[torch.full_like(w, torch.nan) for w in weights]])
    after = (weights, optimizer.state_dict()["state"])
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for number, state in before[1].items():
        assert all(torch.equal(value, after[1][number][key]) for key, value in state.items())
    optimizer.found_inf = torch.tensor(0.0)
    steps_of(optimizer, weights, [good])
    assert not torch.equal(weights[0], before[0][0])


def test_state_survives_saving():
    torch.manual_seed(0)
    start = [torch.randn(4, 6), torch.randn(5)]
    gradients = [[torch.randn_like(w) for w in start] for _ in range(4)]
    whole, parts = copies(start), copies(start)
    steps_of(Muon(whole[:1], whole[1:], 0.01, BETAS, 0.1), whole, gradients)
    first = Muon(parts[:1], parts[1:], 0.01, BETAS, 0.1)
    steps_of(first, parts, gradients[:2])
    second = Muon(parts[:1], parts[1:], 0.5, BETAS, 0.1)
    second.load_state_dict(first.state_dict())
    steps_of(second, parts, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_state_moves_to_the_device_of_the_weights():
    """Read on the CPU, for a network elsewhere; torch's fused kernel wants all in one place."""
    weights = copies([torch.randn(4, 6), torch.randn(5)])
    here = Muon(weights[:1], weights[1:], 0.01, BETAS, 0.1)
    steps_of(here, weights, [[torch.randn_like(w) for w in weights]])
    elsewhere = [torch.nn.Parameter(torch.empty_like(w, device="meta")) for w in weights]
    there = Muon(elsewhere[:1], elsewhere[1:], 0.01, BETAS, 0.1)
    there.load_state_dict(here.state_dict())
    states = [value for state in there.state.values() for value in state.values()]
    assert len(states) == 4 and all(value.device.type == "meta" for value in states)


def test_which_weights_are_matrices():
    config = RECIPES["small"]
    model = DiffusionModel(config.model)
    matrices, others = make_optimizer(model, config).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    hidden = {names[id(weight)] for weight in matrices["params"]}
    rest = {names[id(weight)] for weight in others["params"]}
    assert hidden | rest == set(names.values()) and not hidden & rest
    assert {"unet.conv_in.weight", "unet.conv_out.weight", "class_embedding.0.weight"} <= rest
    assert (
        "class_embedding.2.weight" in hidden and "unet.mid_block.resnets.0.conv1.weight" in hidden
    )
    assert all(weight.ndim == 1 or names[id(weight)].startswith(("unet.conv_", "class_embedding.0"))
               for weight in others["params"])  # fmt: skip
    assert type(make_optimizer(model, TrainConfig())) is torch.optim.AdamW
