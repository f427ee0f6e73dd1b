"""The U-Net, written from scratch and equal to diffusers' `UNet2DModel`.

Ho et al. 2020 (DDPM, appendix B): residual blocks with the time embedding added between their two
convolutions, self-attention at chosen resolutions, skip connections from the way down to the way
up. Argument and parameter names are diffusers', so that `state_dict()`s go both ways.

Shapes: N pictures, C channels, H x W pixels, D embedding channels.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network.blocks import DOWN_BLOCKS, UP_BLOCKS, ResBlock2D, UNetMidBlock2D
from network.layers import SelfAttention2D


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017, section 3.5), cosines first as in diffusers.

    Args:
        timesteps: (N,) in [0, T).
        dim: length of the embedding.

    Returns:
        (N, dim) float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies[None]  # (N, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """MLP on the sinusoidal embedding: (N, in_channels) -> (N, D)."""

    def __init__(self, in_channels: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet2DModel(nn.Module):
    """Predicts the noise (or v, or x_0) in a picture; diffusers' `UNet2DModel`.

    Args:
        sample_size: side of the pictures in pixels; checked against the number of halvings.
        in_channels, out_channels: channels of a picture.
        down_block_types, up_block_types: one name for each resolution, see `DOWN_BLOCKS`.
        block_out_channels: channels of each resolution, from fine to coarse.
        layers_per_block: ResBlocks of a down block; an up block has one more.
        attention_head_dim: channels of an attention head; None: one head of all channels.
        norm_num_groups, norm_eps: of every GroupNorm.
        dropout: before the second convolution of every ResBlock.
        resnet_time_scale_shift: "default": the embedding is added; "scale_shift": see `ResBlock2D`.
        attn_norm_num_groups: of the GroupNorm in the mid block's attention; None: norm_num_groups,
            but no norm with "scale_shift" (as in diffusers).
        time_embedding_dim: D, length of the embeddings; None: 4 * block_out_channels[0].
        class_embed_type: "identity": `class_labels` is an embedding (N, D), added to the time
            embedding; None: unconditional.
        halve_every_block: not in diffusers. Every down block halves the picture, the last one
            too, and every up block doubles it first (the report's stages: 64 -> 1 -> 64).

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types: Sequence[str] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        dropout: float = 0.0,
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        class_embed_type: str | None = None,
        halve_every_block: bool = False,
        resnet_time_scale_shift: str = "default",
        attn_norm_num_groups: int | None = None,
        time_embedding_dim: int | None = None,
    ):
        # Long for its arguments, which are diffusers', and what they must fulfil.
        super().__init__()
        levels = len(block_out_channels)
        if not levels == len(down_block_types) == len(up_block_types):
            raise ValueError(
                f"block_out_channels ({levels}), down_block_types ({len(down_block_types)}) and "
                f"up_block_types ({len(up_block_types)}) must have the same length"
            )
        for channels in block_out_channels:
            if channels % norm_num_groups:
                raise ValueError(
                    f"block_out_channels {channels} is not a multiple of "
                    f"norm_num_groups {norm_num_groups}"
                )
        if class_embed_type not in (None, "identity"):
            raise ValueError(f"class_embed_type {class_embed_type!r}: use 'identity' or None")
        if resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(
                f"resnet_time_scale_shift {resnet_time_scale_shift!r}: "
                "use 'default' or 'scale_shift'"
            )
        halvings = levels if halve_every_block else levels - 1
        if sample_size is not None and sample_size % 2**halvings:
            raise ValueError(
                f"sample_size {sample_size} can't be halved {halvings} times: "
                f"use a multiple of {2**halvings} or fewer block_out_channels"
            )
        self.class_embed_type = class_embed_type
        self.time_embed_dim = time_embedding_dim or 4 * block_out_channels[0]
        res_block = functools.partial(
            ResBlock2D, temb_channels=self.time_embed_dim, groups=norm_num_groups, eps=norm_eps,
            dropout=dropout, time_scale_shift=resnet_time_scale_shift == "scale_shift",
        )  # fmt: skip
        attention = functools.partial(
            SelfAttention2D, head_dim=attention_head_dim, groups=norm_num_groups, eps=norm_eps
        )
        common = {"res_block": res_block, "attention": attention}
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], self.time_embed_dim)

        self.down_blocks = nn.ModuleList()
        channels = block_out_channels[0]
        for i, name in enumerate(down_block_types):
            self.down_blocks.append(
                DOWN_BLOCKS[name](
                    in_channels=channels,
                    out_channels=block_out_channels[i],
                    num_layers=layers_per_block,
                    add_downsample=halve_every_block or i < levels - 1,
                    **common,
                )
            )
            channels = block_out_channels[i]

        if attn_norm_num_groups is None and resnet_time_scale_shift == "default":
            attn_norm_num_groups = norm_num_groups
        attention = functools.partial(attention, groups=attn_norm_num_groups)
        self.mid_block = UNetMidBlock2D(channels, res_block, attention)

        self.up_blocks = nn.ModuleList()
        for i, name in enumerate(up_block_types):
            level = levels - 1 - i
            self.up_blocks.append(
                UP_BLOCKS[name](
                    in_channels=block_out_channels[max(level - 1, 0)],
                    prev_output_channel=channels,
                    out_channels=block_out_channels[level],
                    num_layers=layers_per_block + 1,
                    add_upsample="before" if halve_every_block else "after" if level else None,
                    **common,
                )
            )
            channels = block_out_channels[level]

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.conv_out = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)
        self.halve_every_block = halve_every_block

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor | None = None,
        features: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            sample:       (N, in_channels, H, W) noisy pictures x_t
            timestep:     (N,), a scalar tensor or an int, t in [0, T)
            class_labels: (N, D) embedding of the condition, with class_embed_type "identity"
            features:     takes the features of the way down, and the mid block's in their place:
                side H -> (N, C, H, H), the last ones of each side

        Returns:
            (N, out_channels, H, W)
        """
        if (class_labels is None) != (self.class_embed_type is None):
            raise ValueError("class_labels go with class_embed_type='identity', and only with it")
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding = timestep_embedding(timestep, self.conv_in.out_channels)
        temb = self.time_embedding(embedding.to(self.conv_in.weight.dtype))  # (N, D)
        if class_labels is not None:
            temb = temb + class_labels

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = block(x, temb)
            skips += new_skips
        if self.halve_every_block:
            skips.pop()  # the coarsest features go on through the mid block alone
        if features is not None:
            features |= {skip.shape[2]: skip for skip in skips}
        x = self.mid_block(x, temb)
        if features is not None:
            features[x.shape[2]] = x
        for block in self.up_blocks:
            x = block(x, skips, temb)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
