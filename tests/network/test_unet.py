"""The U-Net equals diffusers' with the same arguments and weights, and has the report's stages."""

from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from networks import CONFIGS

from network.blocks import ResBlock2D
from network.layers import SelfAttention2D, Upsample2D
from network.model import DiffusionModel, stages, widened, zero_init
from network.unet import UNet2DModel
from runtime.settings import ModelConfig, UserError

SMALL = ModelConfig(
    image_size=16, block_out_channels=(32, 32), norm_num_groups=8,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers_in_both_directions(name):
    arguments = CONFIGS[name]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**arguments).eval()
    ours = UNet2DModel(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    size = arguments["sample_size"]
    x = torch.randn(2, arguments.get("in_channels", 3), size, size)
    t = torch.tensor([3, 470])
    labels = None
    if arguments.get("class_embed_type"):
        labels = torch.randn(2, ours.time_embed_dim)
    with torch.no_grad():
        expected = theirs(x, t, labels).sample
        assert (ours(x, t, labels) - expected).abs().max() <= 1e-5
        assert (ours(x, 3, labels) - theirs(x, 3, labels).sample).abs().max() <= 1e-5
        # The other way round, with our own initialisation.
        fresh = UNet2DModel(**arguments).eval()
        theirs.load_state_dict(fresh.state_dict())
        assert (fresh(x, t, labels) - theirs(x, t, labels).sample).abs().max() <= 1e-5
        assert not torch.allclose(fresh(x, t, labels), expected, atol=1e-2)


def test_gradients_equal_diffusers():
    arguments = CONFIGS["wide heads, narrowing channels"]
    torch.manual_seed(0)
    theirs, ours = diffusers.UNet2DModel(**arguments), UNet2DModel(**arguments)
    ours.load_state_dict(theirs.state_dict())
    x, t, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 99]), torch.randn(2, 256)
    theirs(x, t, labels).sample.square().mean().backward()
    ours(x, t, labels).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


def test_dropout_equals_diffusers():
    """Block by block: diffusers' attention draws random numbers for a dropout of 0 too."""
    torch.manual_seed(0)
    theirs = ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=32, groups=4, eps=1e-5, dropout=0.3
    )
    ours = ResBlock2D(8, 16, temb_channels=32, groups=4, dropout=0.3)
    ours.load_state_dict(theirs.state_dict())
    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    torch.manual_seed(1)
    expected = theirs(x, temb)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x, temb), expected)
    assert not torch.allclose(ours(x, temb), expected)  # another mask
    model = UNet2DModel(**CONFIGS["spec"] | dict(block_out_channels=(32,) * 6, dropout=0.3))
    blocks = [m for m in model.modules() if isinstance(m, ResBlock2D)]
    assert len(blocks) == 6 * 2 + 2 + 6 * 3 and all(b.dropout.p == 0.3 for b in blocks)


def test_attention_equals_the_written_out_softmax():
    torch.manual_seed(0)
    attention = SelfAttention2D(channels=32, head_dim=8, groups=4)
    x = torch.randn(3, 32, 4, 5)
    tokens = attention.group_norm(x).reshape(3, 32, 20).transpose(1, 2)
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        q, k, v = (f(tokens)[:, :, part] for f in (attention.to_q, attention.to_k, attention.to_v))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v)
    expected = attention.to_out[0](torch.cat(heads, -1)).transpose(1, 2).reshape(x.shape) + x
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_upsampling_in_one_step_equals_doubling_and_convolution():
    torch.manual_seed(0)
    up, x = Upsample2D(6).double(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    expected = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(up(x), expected, atol=1e-14, rtol=1e-14)


def test_report_stages():
    """The report's table: six halvings to 1x1 and back, attention at 4x4, GroupNorm(8)."""
    config = ModelConfig(halve_every_block=True, norm_num_groups=8)
    rows, _, _ = stages(config)
    table = {name: (i, o) for name, i, o in rows}
    down = [("DownBlock2D", 64, 3, 128), ("DownBlock2D", 32, 128, 128),
            ("DownBlock2D", 16, 128, 256), ("DownBlock2D", 8, 256, 256),
            ("AttnDownBlock2D", 4, 256, 512), ("DownBlock2D", 2, 512, 512)]  # fmt: skip
    for i, (kind, size, c_in, c_out) in enumerate(down):
        # The report counts conv_in (3 -> 128) to the first block.
        entry = table["conv_in Conv2d"][0] if i == 0 else table[f"down {i} {kind}"][0]
        assert entry == (c_in, size, size)
        assert table[f"down {i} {kind}"][1] == (c_out, size // 2, size // 2)
    assert table["mid UNetMidBlock2D"] == ((512, 1, 1), (512, 1, 1))
    for i, size in enumerate((1, 2, 4, 8, 16, 32)):
        kind = "AttnUpBlock2D" if i == 1 else "UpBlock2D"
        i_shape, o_shape = table[f"up {i} {kind}"]
        assert (i_shape[1], o_shape[1]) == (size, 2 * size)
        assert o_shape[0] == (512, 512, 256, 256, 128, 128)[i]
    torch.manual_seed(0)
    model = DiffusionModel(config)
    assert all(m.num_groups == 8 for m in model.modules() if isinstance(m, torch.nn.GroupNorm))
    x = torch.randn(1, 3, 64, 64)
    assert model(x, torch.tensor([5]), torch.zeros(1, 24)).shape == x.shape


def test_size_is_that_of_the_spec():
    """113.7 M parameters and 31.0 GFLOP a forward, as counted with diffusers."""
    _, parameters, flops = stages(ModelConfig())
    assert round(parameters / 1e6, 1) == pytest.approx(113.7, abs=0.3)
    assert round(flops / 1e9, 1) == pytest.approx(31.0, abs=0.1)


def test_condition_is_added_through_the_mlp():
    torch.manual_seed(0)
    model = DiffusionModel(SMALL).eval()
    x, labels = torch.randn(2, 3, 16, 16), torch.eye(24)[:2]
    first, act, second = model.class_embedding
    assert (first.in_features, first.out_features, second.out_features) == (24, 128, 128)
    expected = model.unet(x, 7, second(torch.nn.functional.silu(first(labels))))
    torch.testing.assert_close(model(x, 7, labels), expected)


def test_zero_init_starts_at_the_identity():
    torch.manual_seed(0)
    model = DiffusionModel(ModelConfig(
        image_size=16, block_out_channels=(64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ))  # fmt: skip
    zero_init(model)
    x, labels = torch.randn(2, 3, 16, 16), torch.eye(24)
    assert model(x, 3, labels[:2]).abs().max() == 0  # the output's convolution
    h, temb = torch.randn(2, 64, 16, 16), torch.randn(2, 256)
    assert torch.equal(model.unet.down_blocks[0].resnets[0](h, temb), h)
    assert torch.equal(model.unet.mid_block.attentions[0](h), h)
    assert model.class_embedding[0].weight.std().item() == pytest.approx(1, abs=0.05)
    assert 0.3 < model.class_embedding(labels).std() < 1.0  # after a SiLU


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_size=48), "multiple of 32"),
        (dict(block_out_channels=(128, 128)), "same length"),
        (dict(norm_num_groups=3), "multiple of"),
        (dict(attention_head_dim=1024), "attention_head_dim"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        DiffusionModel(ModelConfig(**changes))


def test_patches_are_positions_of_more_channels():
    """A network that returns its input unchanged, in patches: channel c p^2 + i p + j of a
    position is pixel (i, j) of its patch; and back."""
    model = DiffusionModel(replace(SMALL, patch_size=4))
    x = torch.randn(2, 3, 16, 16)
    assert model(x, 3, torch.zeros(2, 24)).shape == x.shape

    class Returns(torch.nn.Module):
        def forward(self, patches, t, embedding, features=None):
            self.seen = patches
            return patches

    model.unet = Returns()
    assert torch.equal(model(x, 3, torch.zeros(2, 24)), x)
    assert model.unet.seen.shape == (2, 48, 4, 4)
    assert torch.equal(model.unet.seen[0, 16:32, 1, 2].view(4, 4), x[0, 1, 4:8, 8:12])
    with pytest.raises(UserError, match="--patch_size 3: does not divide --image_size 16"):
        DiffusionModel(replace(SMALL, patch_size=3))


def test_wider_embeddings_start_with_the_same_function():
    torch.manual_seed(0)
    narrow, wide = DiffusionModel(SMALL), DiffusionModel(replace(SMALL, time_embedding_dim=200))
    fresh = {name: value.clone() for name, value in wide.state_dict().items()}
    wide.load_state_dict(widened(narrow.state_dict(), fresh))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 200]), torch.eye(24)[:2]
    torch.testing.assert_close(wide(x, t, y), narrow(x, t, y))
    wide(x, t, y).square().sum().backward()
    assert wide.unet.mid_block.resnets[0].time_emb_proj.weight.grad[:, 128:].abs().max() > 0
    assert torch.equal(
        wide.class_embedding[0].weight[128:], fresh["class_embedding.0.weight"][128:]
    )
    with pytest.raises(ValueError, match="does not fit"):
        widened(fresh, narrow.state_dict())
