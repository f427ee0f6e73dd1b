"""The conditional network: class-embedding MLP and U-Net, and its table of stages."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from network.blocks import ResBlock2D
from network.layers import SelfAttention2D
from network.unet import UNet2DModel
from runtime.settings import ModelConfig, UserError


class DiffusionModel(nn.Module):
    """eps_theta(x_t, t, y): the U-Net with the condition's embedding added to the time embedding.

    Raises:
        UserError: settings that do not fit together.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        patch = config.patch_size
        if config.image_size % patch:
            raise UserError(
                f"--patch_size {patch}: does not divide --image_size {config.image_size}"
            )
        try:
            self.unet = UNet2DModel(
                **unet_arguments(config), halve_every_block=config.halve_every_block
            )
        except ValueError as error:
            raise UserError(f"network settings: {error}") from None
        dim = self.unet.time_embed_dim
        self.class_embedding = nn.Sequential(
            nn.Linear(config.num_classes, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.image_size, self.patch_size = config.image_size, patch

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | int,
        labels: Tensor,
        features: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            x_t:    (N, 3, H, W) noisy pictures
            t:      (N,) or a scalar, timesteps in [0, T)
            labels: (N, num_classes) multi-hot; all zeros means "no condition"
            features: takes the network's features, see `UNet2DModel.forward`

        Returns:
            (N, 3, H, W) prediction: eps, v or x_0, as it was trained
        """
        patches = F.pixel_unshuffle(x_t, self.patch_size)  # (N, 3 p^2, H / p, W / p)
        prediction = self.unet(patches, t, self.class_embedding(labels), features)
        return F.pixel_shuffle(prediction, self.patch_size)


def unet_arguments(config: ModelConfig) -> dict[str, Any]:
    """What `UNet2DModel` is made of, ours and diffusers' alike."""
    return dict(
        sample_size=config.image_size // config.patch_size,
        in_channels=3 * config.patch_size**2,
        out_channels=3 * config.patch_size**2,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        dropout=config.dropout,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        attn_norm_num_groups=config.norm_num_groups,  # diffusers' default is none, with scale_shift
        time_embedding_dim=config.time_embedding_dim,
        class_embed_type="identity",
    )


@torch.no_grad()
def zero_init(model: DiffusionModel) -> None:
    """Start as the identity, with a condition that is heard.

    Residual branches and the output start at 0 (Ho et al. 2020's code; Goyal et al. 2017, section
    5.1). The embedding of an object starts with entries of unit variance: PyTorch's start leaves
    it so faint beside the time embedding that a short training hardly finds it.
    """
    for module in model.modules():
        if isinstance(module, ResBlock2D):
            _zero(module.conv2)
        elif isinstance(module, SelfAttention2D):
            _zero(module.to_out[0])
    _zero(model.unet.conv_out)
    first, _, second = model.class_embedding
    nn.init.normal_(first.weight)
    nn.init.normal_(second.weight, std=second.in_features**-0.5)


@torch.no_grad()
def widened(weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with narrower embeddings, for one with wider ones: it gives the same.

    Old outputs take nothing from new inputs at first (zeros), new outputs start as they are in
    `fresh` (Net2Net, Chen et al. 2016, in spirit). What grows is `time_embedding_dim`.

    Args:
        weights: state dict of the narrower network.
        fresh: state dict of the wider one, as initialised.

    Raises:
        ValueError: other names, or a weight that is wider than in `fresh`.
    """
    if weights.keys() != fresh.keys():
        raise ValueError("another network's weights")
    result = {}
    for name, new in fresh.items():
        old, new = weights[name], new.clone()
        if old.ndim != new.ndim or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
            raise ValueError(f"{name}: {tuple(old.shape)} does not fit into {tuple(new.shape)}")
        new[: len(old)] = 0
        new[tuple(slice(side) for side in old.shape)] = old
        result[name] = new
    return result


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def stages(config: ModelConfig) -> tuple[list[tuple[str, tuple, tuple]], int, int]:
    """Run the network on shapes alone (no memory, no arithmetic).

    Returns:
        a list of (name, (C, H, W) in, (C, H, W) out) for every block, the number of parameters,
        and the floating-point operations of one forward pass of one picture (a multiply-add is 2).
    """
    rows: list[tuple[str, tuple, tuple]] = []

    def record(name: str, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        out = output[0] if isinstance(output, tuple) else output
        shapes = tuple(inputs[0].shape[1:]), tuple(out.shape[1:])
        rows.append((f"{name} {type(module).__name__}", *shapes))

    with torch.device("meta"):
        model = DiffusionModel(config).eval()
        unet = model.unet
        for name, module in (
            ("conv_in", unet.conv_in),
            *((f"down {i}", block) for i, block in enumerate(unet.down_blocks)),
            ("mid", unet.mid_block),
            *((f"up {i}", block) for i, block in enumerate(unet.up_blocks)),
            ("conv_out", unet.conv_out),
        ):
            module.register_forward_hook(functools.partial(record, name))
        x = torch.empty(1, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.empty(1), torch.empty(1, config.num_classes))
    return rows, sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def summary(config: ModelConfig) -> str:
    """The table of stages, parameters and FLOPs, for people."""
    rows, parameters, flops = stages(config)
    lines = [f"{'stage':<24}{'in (C, H, W)':>18}{'out (C, H, W)':>18}"]
    lines += [f"{name:<24}{str(i):>18}{str(o):>18}" for name, i, o in rows]
    lines.append(f"{parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP a forward picture")
    return "\n".join(lines)
