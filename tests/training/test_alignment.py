"""Features drawn towards a classifier's."""

import pytest
import torch
from conftest import OBJECTS, SMALL_NETWORK, error_of, train_argv

import train
import train_evaluator
from iclevr.dataset import IclevrDataset
from judging.evaluator import Evaluator, build_evaluator, load_evaluator
from network.checkpoint import load_checkpoint
from network.model import DiffusionModel
from runtime.settings import ModelConfig, UserError
from training.alignment import Alignment, feature_channels
from training.recipes import RECIPES

SMALL = ModelConfig(image_size=16, block_out_channels=(16, 32), norm_num_groups=8,
                    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                    up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return Evaluator(build_evaluator(24).eval().requires_grad_(False), "t", "t.pth", OBJECTS)


def test_network_hands_out_the_last_features_of_each_side():
    assert feature_channels(RECIPES["small"].model) == {32: 32, 16: 64, 8: 128, 4: 128}
    full = feature_channels(RECIPES["original"].model)
    assert full == {64: 128, 32: 128, 16: 256, 8: 256, 4: 512, 2: 512}
    model, features = DiffusionModel(SMALL), {}
    seen = []
    model.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    model.unet.down_blocks[0].resnets[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    x, y = torch.randn(2, 3, 16, 16), torch.zeros(2, 24)
    with_features = model(x, 3, y, features)
    assert torch.equal(features[16], seen[0]) and torch.equal(features[8], seen[1])
    assert torch.equal(with_features, model(x, 3, y))


def test_distance_is_one_minus_cosine(teacher):
    torch.manual_seed(0)
    alignment = Alignment(teacher, RECIPES["small"].model)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    features = {8: torch.randn(3, 128, 8, 8), 4: torch.randn(3, 128, 4, 4)}
    expected = torch.zeros(3)
    resnet, x = teacher.model, images
    for part in (resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1):
        x = part(x)
    for name, stage, side in (("layer2", resnet.layer2, 8), ("layer3", resnet.layer3, 4)):
        x = stage(x)
        ours = alignment.heads[name](features[side])
        dots = (ours * x).sum(1) / (ours.norm(dim=1) * x.norm(dim=1))
        expected += (1 - dots.mean(dim=(1, 2))) / 2
    torch.testing.assert_close(alignment(features, images), expected)
    assert not any("teacher" in name for name in alignment.state_dict())
    alignment.heads["layer2"] = alignment.heads["layer3"] = torch.nn.Identity()
    perfect = {x.shape[2]: 3 * x for x in alignment.teacher_features(images).values()}
    assert alignment(perfect, images).abs().max() < 1e-5


def test_training_aligns_the_network_and_keeps_no_head(world, tmp_path):
    file = tmp_path / "teacher.pth"
    argv = ["--data_dir", str(world), "--epochs", "1", "--device", "cpu"]
    train_evaluator.main([*argv, "--seed", "1", "--out", str(file)])
    argv = train_argv(world, tmp_path, "--epochs", 12, "--lr", 1e-3, "--lr_warmup_steps", 0)
    plain = load_checkpoint(train.main([*argv, "--run_name", "plain"]))
    aligned = [*argv, "--align_to", str(file), "--align_weight", "2"]
    checkpoint = load_checkpoint(train.main([*aligned, "--run_name", "aligned"]))
    assert checkpoint.model.keys() == plain.model.keys()
    heads = checkpoint.training["alignment"]
    assert heads and not set(heads) & set(checkpoint.model)
    assert any(not torch.equal(checkpoint.model[k], v) for k, v in plain.model.items())

    def distance(state):
        evaluator = load_evaluator(file, OBJECTS)
        alignment = Alignment(evaluator, checkpoint.config.model)
        alignment.load_state_dict(heads)
        model = DiffusionModel(checkpoint.config.model)
        model.load_state_dict(state)
        images = torch.stack([x for x, _ in IclevrDataset(world, world / "iclevr", "train", 16)])
        features = {}
        model(images, 2, torch.zeros(len(images), 24), features)
        return alignment(features, images).mean()

    torch.manual_seed(0)
    assert distance(checkpoint.model) < 0.8 * distance(
        DiffusionModel(checkpoint.config.model).state_dict()
    )


def test_the_judge_is_no_teacher(trained, tmp_path):
    data, _, _ = trained
    argv = ["--data_dir", data, "--output_dir", tmp_path, "--device", "cpu", *SMALL_NETWORK]
    message = error_of(train.main, [*argv, "--align_to", data / "evaluator.pth"])
    assert "is the judge itself" in message and "--seed 1" in message
    message = error_of(train.main, [*argv, "--align_to", tmp_path / "none.pth"])
    assert "none.pth" in message


def test_a_network_of_other_sides_is_refused(teacher):
    with pytest.raises(UserError, match="no features of 8x8 or 4x4 positions, but of 6x6"):
        Alignment(teacher, ModelConfig(
            image_size=6, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ))  # fmt: skip
