"""Self-attention with key/value token compression, and cross-attention to the caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import KVCompression

# (q, k, v, mask) -> out: q (B, heads, N, D), k and v (B, heads, L, D), out like q. The mask is
# None or boolean (B, 1, 1, L), True where a key takes part.
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The default attention function: PyTorch's own, which picks its kernel by itself."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> b n (h d)")


class KVCompressor(nn.Module):
    """Shrinks the token grid of keys and values by `factor` on each axis (arXiv 2403.04692, 3.3).

    The convolution and the LayerNorm after it are registered on the attention module, where the
    files keep them; this function-like module only says what happens to the grid. Sides that
    `factor` does not divide lose their remainder, as in the released code; sides shorter than
    `factor` are padded to it by repeating the edge, so that at least one key is left.
    """

    def __init__(self, compression: KVCompression) -> None:
        super().__init__()
        self.sampling = compression.sampling
        self.factor = compression.factor

    def forward(self, kv: Tensor, grid: tuple[int, int], sr: nn.Module | None,
                norm: nn.Module | None) -> Tensor:
        rows, columns = grid
        kv = rearrange(kv, "b (h w) c -> b c h w", h=rows)
        bottom, right = max(self.factor - rows, 0), max(self.factor - columns, 0)
        if bottom or right:
            kv = F.pad(kv, (0, right, 0, bottom), mode="replicate")
        if self.sampling == "conv":
            return norm(rearrange(sr(kv), "b c h w -> b (h w) c"))
        rows, columns = (side // self.factor for side in kv.shape[-2:])
        kv = kv[:, :, :: self.factor, :: self.factor][:, :, :rows, :columns]
        return rearrange(kv, "b c h w -> b (h w) c")


class SelfAttention(nn.Module):
    """Attention among image tokens: (B, N, C) -> (B, N, C).

    `compression` shrinks keys and values, `qk_norm` normalises queries and keys at full width
    before that and before the split into heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool,
                 compression: KVCompression | None, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = operations.Linear(hidden_size, 3 * hidden_size, **factory)
        self.proj = operations.Linear(hidden_size, hidden_size, **factory)
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = operations.LayerNorm(hidden_size, eps=1e-5, **factory)
            self.k_norm = operations.LayerNorm(hidden_size, eps=1e-5, **factory)
        self.compressor = self.sr = self.norm = None
        if compression is not None:
            self.compressor = KVCompressor(compression)
            if compression.sampling == "conv":
                self.sr = operations.Conv2d(hidden_size, hidden_size, groups=hidden_size,
                                            kernel_size=compression.factor,
                                            stride=compression.factor, **factory)
                self.norm = operations.LayerNorm(hidden_size, eps=1e-5, **factory)

    def forward(self, x: Tensor, grid: tuple[int, int], attention: AttentionFunction) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, C) each
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.compressor is not None:
            # k and v share one convolution and one norm: run them as one batch
            k, v = self.compressor(torch.cat([k, v]), grid, self.sr, self.norm).chunk(2)
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        return self.proj(merge_heads(attention(q, k, v, None)))


class CrossAttention(nn.Module):
    """Attention from image tokens to the caption: (B, N, C) -> (B, N, C).

    `context` is the projected caption (B, L, C), or the keys and values made of it once by
    `keys_values`, since neither changes between sampling steps.
    """

    def __init__(self, hidden_size: int, num_heads: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = operations.Linear(hidden_size, hidden_size, **factory)
        self.kv_linear = operations.Linear(hidden_size, 2 * hidden_size, **factory)
        self.proj = operations.Linear(hidden_size, hidden_size, **factory)

    def keys_values(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> keys and values, each (B, heads, L, D)."""
        k, v = self.kv_linear(caption).chunk(2, dim=-1)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor], mask: Tensor | None,
                attention: AttentionFunction) -> Tensor:
        q = split_heads(self.q_linear(x), self.num_heads)
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.proj(merge_heads(attention(q, k, v, mask)))
