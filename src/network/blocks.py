"""The blocks of the U-Net: residual, down, mid and up, with and without attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network.layers import Downsample2D, SelfAttention2D, Upsample2D

MakeResBlock = Callable[[int, int], "ResBlock2D"]
"""From channels in and out; all else is the same throughout a network."""
MakeAttention = Callable[[int], SelfAttention2D]
"""From channels."""


class ResBlock2D(nn.Module):
    """GroupNorm, SiLU, conv; plus embedding; GroupNorm, SiLU, dropout, conv; plus shortcut.

    (N, in_channels, H, W), (N, temb_channels) -> (N, out_channels, H, W).

    Args:
        time_scale_shift: the embedding is not added, but scales and shifts the features behind
            the second GroupNorm (Dhariwal & Nichol 2021, section 4.2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        time_scale_shift: bool = False,
    ):
        super().__init__()
        self.time_scale_shift = time_scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (1 + time_scale_shift))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time_emb_proj(F.silu(temb))[:, :, None, None]
        if self.time_scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


class DownBlock2D(nn.Module):
    """`num_layers` ResBlocks, then a downsampler; every output is kept as a skip connection."""

    has_attention = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        add_downsample: bool,
        res_block: MakeResBlock,
        attention: MakeAttention,
    ):
        super().__init__()
        if self.has_attention:
            self.attentions = nn.ModuleList(attention(out_channels) for _ in range(num_layers))
        self.resnets = nn.ModuleList(
            res_block(in_channels if i == 0 else out_channels, out_channels)
            for i in range(num_layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)]) if add_downsample else None

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the block's output and its skip connections, in the order they were made."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.has_attention:
                x = self.attentions[i](x)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class AttnDownBlock2D(DownBlock2D):
    """A `DownBlock2D` with self-attention after every ResBlock."""

    has_attention = True


class UpBlock2D(nn.Module):
    """`num_layers` ResBlocks, each on the features joined with a skip connection; an upsampler.

    Args:
        in_channels: channels of the last skip connection (made by the block one level finer).
        prev_output_channel: channels that come in from below.
        out_channels: channels of the block, and of the other skip connections.
        add_upsample: None, "after" the ResBlocks (diffusers), or "before" them.
    """

    has_attention = False

    def __init__(
        self,
        in_channels: int,
        prev_output_channel: int,
        out_channels: int,
        num_layers: int,
        add_upsample: str | None,
        res_block: MakeResBlock,
        attention: MakeAttention,
    ):
        super().__init__()
        if self.has_attention:
            self.attentions = nn.ModuleList(attention(out_channels) for _ in range(num_layers))
        self.resnets = nn.ModuleList()
        for i in range(num_layers):
            channels = prev_output_channel if i == 0 else out_channels
            skip_channels = in_channels if i == num_layers - 1 else out_channels
            self.resnets.append(res_block(channels + skip_channels, out_channels))
        self.add_upsample = add_upsample
        channels = prev_output_channel if add_upsample == "before" else out_channels
        self.upsamplers = nn.ModuleList([Upsample2D(channels)]) if add_upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        """Takes its skip connections off the end of `skips`."""
        if self.add_upsample == "before":
            x = self.upsamplers[0](x)
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.has_attention:
                x = self.attentions[i](x)
        if self.add_upsample == "after":
            x = self.upsamplers[0](x)
        return x


class AttnUpBlock2D(UpBlock2D):
    """An `UpBlock2D` with self-attention after every ResBlock."""

    has_attention = True


class UNetMidBlock2D(nn.Module):
    """ResBlock, self-attention, ResBlock at the coarsest resolution."""

    def __init__(self, channels: int, res_block: MakeResBlock, attention: MakeAttention):
        super().__init__()
        self.attentions = nn.ModuleList([attention(channels)])
        self.resnets = nn.ModuleList(res_block(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x)
        return self.resnets[1](x, temb)


DOWN_BLOCKS = {"DownBlock2D": DownBlock2D, "AttnDownBlock2D": AttnDownBlock2D}
UP_BLOCKS = {"UpBlock2D": UpBlock2D, "AttnUpBlock2D": AttnUpBlock2D}
