"""The U-Net, written from scratch and equal to diffusers' `UNet2DModel`.

Ho et al. 2020 (DDPM, appendix B): residual blocks with the time embedding added between their two
convolutions, self-attention at chosen resolutions, skip connections from the way down to the way
up. Argument and parameter names are diffusers', so that `state_dict()`s go both ways.

Shapes: N pictures, C channels, H x W pixels, D embedding channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW_POSITIONS = 256
"""Up to so many, attention on the CPU is written out."""


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


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018), and on request a scale and a shift of its result.

    (N, C, H, W), and scale and shift (N, C) or neither -> (N, C, H, W):
    norm(x) * (1 + scale) + shift.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        if x.device.type == "cpu":
            gamma, beta = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
            if scale is not None:
                gamma, beta = gamma * (1 + scale), beta * (1 + scale) + shift
            return NormOnCpu.apply(x, gamma, beta, self.num_groups, self.eps)
        h = super().forward(x)
        return h if scale is None else h * (1 + _to_2d(scale)) + _to_2d(shift)


class NormOnCpu(torch.autograd.Function):
    """y = gamma x_hat + beta, x_hat being x with mean 0 and variance 1 in every group of channels.

    gamma and beta are (N, C). On the CPU, torch's own backward pass of a GroupNorm takes some ten
    times as long as this one, which is three sums and two products over the picture.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float
    ) -> Tensor:
        n, c, height, width = x.shape
        x_hat, _, rstd = torch.native_group_norm(x, None, None, n, c, height * width, groups, eps)
        ctx.save_for_backward(x_hat, gamma, rstd)
        return torch.addcmul(_to_2d(beta.to(x.dtype)), x_hat, _to_2d(gamma.to(x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, gamma, rstd = ctx.saved_tensors  # rstd: 1 / standard deviation, (N, groups)
        groups, of_group = rstd.shape[1], grad.shape[1] // rstd.shape[1]
        d_gamma = (grad * x_hat).sum(dim=(2, 3), dtype=gamma.dtype)  # (N, C)
        d_beta = grad.sum(dim=(2, 3), dtype=gamma.dtype)
        rstd = rstd.to(gamma.dtype).repeat_interleave(of_group, dim=1)  # (N, C)

        def mean(sums: Tensor) -> Tensor:
            """Sums over a channel -> the mean over its group, both (N, C)."""
            total = sums.unflatten(1, (groups, of_group)).sum(dim=2)
            return (total / (of_group * grad[0, 0].numel())).repeat_interleave(of_group, dim=1)

        # d x = rstd (gamma grad - mean(gamma grad) - x_hat mean(gamma grad x_hat))
        a, b, c = rstd * gamma, -rstd * mean(gamma * d_beta), -rstd * mean(gamma * d_gamma)
        a, b, c = (_to_2d(each.to(grad.dtype)) for each in (a, b, c))
        d_x = torch.addcmul(b, x_hat, c).addcmul_(grad, a)
        return d_x, d_gamma, d_beta, None, None


def _to_2d(channels: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1)."""
    return channels[:, :, None, None]


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
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (1 + time_scale_shift))
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time_emb_proj(F.silu(temb))
        if self.time_scale_shift:
            h = self.norm2(h, *emb.chunk(2, dim=1))
        else:
            h = self.norm2(h + _to_2d(emb))
        h = self.conv2(self.dropout(F.silu(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, equation 1), all (N, heads, H * W, d)."""
    if q.device.type == "cpu" and q.shape[2] <= FEW_POSITIONS:
        # The CPU's fused kernel, above all its backward pass, is made for long sequences.
        return (q * q.shape[3] ** -0.5 @ k.mT).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention2D(nn.Module):
    """Multi-head self-attention over the H * W positions, with a residual connection.

    (N, C, H, W) -> (N, C, H, W), see `attention`.

    Args:
        channels: C.
        head_dim: d, channels of a head; there are C // d heads. None: one head of C channels.
        groups: of the GroupNorm before it; None: no norm.
    """

    def __init__(
        self, channels: int, head_dim: int | None = 8, groups: int | None = 32, eps: float = 1e-5
    ):
        super().__init__()
        self.head_dim = head_dim or channels
        inner = channels // self.head_dim * self.head_dim
        if inner == 0:
            raise ValueError(f"attention_head_dim {head_dim} exceeds the {channels} channels")
        self.group_norm = GroupNorm(groups, channels, eps=eps) if groups else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])  # a list for diffusers' name

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        normed = x if self.group_norm is None else self.group_norm(x)
        tokens = normed.flatten(2).transpose(1, 2)  # (N, H * W, C)
        q, k, v = (  # (N, heads, H * W, d)
            project(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[0](out)  # (N, H * W, C)
        return x + out.transpose(1, 2).reshape(n, c, height, width)


class Downsample2D(nn.Module):
    """Convolution of stride 2: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Nearest neighbour, then convolution: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # The same in one step, with 16 instead of 36 multiplications for each pixel that comes in:
        # a transposed convolution whose kernel is the 3x3 one, doubled as the pixels are.
        padded = F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1))
        kernel = (4 * F.avg_pool2d(padded, 2, stride=1)).transpose(0, 1)  # (C_in, C_out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class DownBlock2D(nn.Module):
    """`num_layers` ResBlocks, then a downsampler; every output is kept as a skip connection."""

    has_attention = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        num_layers: int = 2,
        add_downsample: bool = True,
        attention_head_dim: int | None = 8,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        time_scale_shift: bool = False,
    ):
        super().__init__()
        if self.has_attention:
            self.attentions = nn.ModuleList(
                SelfAttention2D(out_channels, attention_head_dim, groups, eps)
                for _ in range(num_layers)
            )
        self.resnets = nn.ModuleList(
            ResBlock2D(
                in_channels if i == 0 else out_channels,
                out_channels, temb_channels, groups, eps, dropout, time_scale_shift,
            )
            for i in range(num_layers)
        )  # fmt: skip
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
        temb_channels: int,
        num_layers: int = 3,
        add_upsample: str | None = "after",
        attention_head_dim: int | None = 8,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        time_scale_shift: bool = False,
    ):
        super().__init__()
        if self.has_attention:
            self.attentions = nn.ModuleList(
                SelfAttention2D(out_channels, attention_head_dim, groups, eps)
                for _ in range(num_layers)
            )
        self.resnets = nn.ModuleList()
        for i in range(num_layers):
            channels = prev_output_channel if i == 0 else out_channels
            skip_channels = in_channels if i == num_layers - 1 else out_channels
            self.resnets.append(
                ResBlock2D(
                    channels + skip_channels, out_channels, temb_channels, groups, eps, dropout,
                    time_scale_shift,
                )
            )  # fmt: skip
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

    def __init__(
        self,
        channels: int,
        temb_channels: int,
        attention_head_dim: int | None = 8,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        time_scale_shift: bool = False,
        attn_groups: int | None = 32,
    ):
        super().__init__()
        self.attentions = nn.ModuleList(
            [SelfAttention2D(channels, attention_head_dim, attn_groups, eps)]
        )
        self.resnets = nn.ModuleList(
            ResBlock2D(channels, channels, temb_channels, groups, eps, dropout, time_scale_shift)
            for _ in range(2)
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x)
        return self.resnets[1](x, temb)


DOWN_BLOCKS = {"DownBlock2D": DownBlock2D, "AttnDownBlock2D": AttnDownBlock2D}
UP_BLOCKS = {"UpBlock2D": UpBlock2D, "AttnUpBlock2D": AttnUpBlock2D}


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
        common = dict(
            temb_channels=self.time_embed_dim,
            attention_head_dim=attention_head_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            dropout=dropout,
            time_scale_shift=resnet_time_scale_shift == "scale_shift",
        )
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
        self.mid_block = UNetMidBlock2D(channels, attn_groups=attn_norm_num_groups, **common)

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

        self.conv_norm_out = GroupNorm(norm_num_groups, channels, eps=norm_eps)
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
