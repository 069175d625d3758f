"""What turns inputs into vectors of the hidden width: latent, position, time and caption."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SINUSOID_SIZE = 256


def sinusoid(values: Tensor, size: int = SINUSOID_SIZE) -> Tensor:
    """Sinusoidal embedding of scalars, cosine half first: (B,) -> (B, size), always float32.

    Frequencies run from 1 down to 1/10000 without a shift (arXiv 1706.03762, section 3.5, in the
    order DiT uses). float32 because bfloat16 cannot hold timesteps above 256.
    """
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(rows: int, columns: int, hidden_size: int, position_range: float,
                   device: torch.device | str | None = None) -> Tensor:
    """Fixed 2-D sin/cos table of a token grid: (1, rows * columns, hidden_size), float64.

    Each axis is stretched to [0, position_range) whatever its token count, so that one model serves
    every size and ratio. The first half of the channels encodes the column, the second half the
    row, each as sines then cosines (arXiv 2403.04692, section 3.2, "PE interpolation").
    """
    quarter = hidden_size // 4
    options = {"dtype": torch.float64, "device": device}
    omega = 10000.0 ** (-torch.arange(quarter, **options) / quarter)

    def axis(count: int) -> Tensor:
        positions = torch.arange(count, **options) * (position_range / count)
        angles = positions[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (count, C / 2)

    by_column = axis(columns)[None, :, :].expand(rows, -1, -1)
    by_row = axis(rows)[:, None, :].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).reshape(1, rows * columns, hidden_size)


class PatchEmbedder(nn.Module):
    """Latent patches to tokens: (B, in_channels, H, W) -> (B, H/p * W/p, C), rows outermost.

    Sides that are no multiple of the patch are padded at the bottom and the right by repeating the
    edge; the caller crops the output.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int,
                 operations: Any, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = operations.Conv2d(in_channels, hidden_size, kernel_size=patch_size,
                                      stride=patch_size, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = tuple((side + self.patch_size - 1) // self.patch_size for side in x.shape[-2:])
        bottom, right = (n * self.patch_size - side
                         for n, side in zip(grid, x.shape[-2:], strict=True))
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        tokens = rearrange(self.proj(x), "b c h w -> b (h w) c")
        # the convolution leaves channels outermost, every sum after it would keep that order, and
        # each LayerNorm of each block would copy the tokens to change it
        return tokens.contiguous(), grid


class ScalarEmbedder(nn.Module):
    """Scalars (timestep, pixel sizes, ratio) to vectors: (B, n) -> (B, n * size), float32.

    Weights and arithmetic stay float32 in a half-precision model: a few rows that every token
    depends on, worth a tenth of the whole rounding error in bfloat16.
    """

    def __init__(self, size: int, operations: Any, device: torch.device | str | None) -> None:
        super().__init__()
        factory = {"dtype": torch.float32, "device": device}
        self.mlp = nn.Sequential(
            operations.Linear(SINUSOID_SIZE, size, **factory),
            nn.SiLU(),
            operations.Linear(size, size, **factory),
        )

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(sinusoid(values.reshape(-1))).reshape(values.shape[0], -1)


class FeedForward(nn.Module):
    """Two linear layers around a tanh-approximated GELU: (..., in) -> (..., out)."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int,
                 operations: Any, **factory: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(in_size, hidden_size, **factory)
        self.fc2 = operations.Linear(hidden_size, out_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """T5 states to the hidden width: (B, L, caption_channels) -> (B, L, C).

    `y_embedding` is the learned null caption, (max_tokens, caption_channels), in the space of T5
    states: it goes through the same projection as a caption. None for files that lack it. It is
    an input and no weight, so it stays float32, which holds every stored value, in any model.
    """

    y_embedding: Tensor | None

    def __init__(self, caption_channels: int, hidden_size: int, max_tokens: int,
                 null_caption: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.y_proj = FeedForward(caption_channels, hidden_size, hidden_size, operations, **factory)
        factory["dtype"] = torch.float32
        table = torch.zeros(max_tokens, caption_channels, **factory) if null_caption else None
        self.register_buffer("y_embedding", table)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)
