"""The layers of the U-Net's blocks, with forms of their own for the CPU where those are faster."""

import torch.nn.functional as F
from torch import Tensor, nn

FEW_POSITIONS = 256
"""Up to so many, attention on the CPU is written out."""


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
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps) if groups else None
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
