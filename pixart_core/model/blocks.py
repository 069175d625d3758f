"""The PixArt block and the final layer: DiT with one shared adaLN and attention to the caption."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ControlNetConfig, KVCompression, PixArtConfig
from .attention import AttentionFunction, CrossAttention, SelfAttention
from .embedders import FeedForward


@dataclass(frozen=True)
class BlockInputs:
    """What every block sees beside the tokens: one object for a whole forward pass.

    `t0` (B, 6, C) float32 modulates, `context` is the projected caption (B, L, C) or one pair of
    keys and values for each block, `mask` None or (B, 1, 1, L), `grid` the token rows and columns.
    `residuals` are what ControlNets add to the input of block 1, block 2 and so on, (B, N, C)
    each.
    """

    t0: Tensor
    context: Tensor | tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor | None
    grid: tuple[int, int]
    attention: AttentionFunction
    residuals: tuple[Tensor, ...] = ()

    def for_block(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        return self.context[index] if isinstance(self.context, tuple) else self.context

    def of_rows(self, rows: slice) -> BlockInputs:
        """The inputs of some samples of the batch; `context` must be a projected caption."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        return dataclasses.replace(self, t0=self.t0[rows], context=self.context[rows], mask=mask)

    def steered(self, index: int, tokens: Tensor) -> Tensor:
        """The tokens (B, N, C) that enter block `index`: with what the ControlNets add there."""
        if 0 < index <= len(self.residuals):
            return tokens + self.residuals[index - 1]
        return tokens


def cast_parameter(parameter: Tensor, like: Tensor) -> Tensor:
    """A raw parameter in the dtype and on the device of the activations it meets.

    An `operations` namespace may carry its own function of this name, for a host whose weights
    live elsewhere until they are used.
    """
    return parameter.to(device=like.device, dtype=like.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, C), shift and scale (B, 1, C) float32 -> (B, N, C) in the dtype of x."""
    return torch.addcmul(shift.to(x.dtype), x, (1 + scale).to(x.dtype))


def add_gated(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate * h: x and h (B, N, C), gate (B, 1, C) float32."""
    return torch.addcmul(x, gate.to(x.dtype), h)


class ScaleShift(nn.Module):
    """Base of the modules that own a `scale_shift_table`, (rows, C), added to a time vector.

    Table and sum are float32 in a half-precision model and are rounded once, where they meet the
    tokens.
    """

    def __init__(self, rows: int, hidden_size: int, operations: Any,
                 device: torch.device | str | None) -> None:
        super().__init__()
        table = torch.empty(rows, hidden_size, dtype=torch.float32, device=device)
        if not table.is_meta:  # drawing numbers there loads all of torch._dynamo
            nn.init.normal_(table, std=hidden_size**-0.5)
        self.scale_shift_table = nn.Parameter(table)
        self._cast = getattr(operations, "cast_parameter", cast_parameter)

    def scale_shift(self, t: Tensor) -> tuple[Tensor, ...]:
        """t (B, rows or 1, C) float32 -> one (B, 1, C) for each row of the table."""
        table = self._cast(self.scale_shift_table, t)
        return (table + t).chunk(table.shape[0], dim=1)


class PixArtBlock(ScaleShift):
    """One transformer block, adaLN-single (arXiv 2310.00426, section 2.3 and figure 4).

    Cross-attention has neither norm, modulation nor gate.
    """

    def __init__(self, config: PixArtConfig | ControlNetConfig,
                 compression: KVCompression | None, operations: Any, **factory: Any) -> None:
        super().__init__(6, config.hidden_size, operations, factory.get("device"))
        size, heads = config.hidden_size, config.num_heads
        self.norm1 = operations.LayerNorm(size, elementwise_affine=False, eps=1e-6, **factory)
        self.attn = SelfAttention(size, heads, config.qk_norm, compression, operations, **factory)
        self.cross_attn = CrossAttention(size, heads, operations, **factory)
        self.norm2 = operations.LayerNorm(size, elementwise_affine=False, eps=1e-6, **factory)
        self.mlp = FeedForward(size, config.mlp_hidden_size, size, operations, **factory)

    def forward(self, x: Tensor, t0: Tensor, context: Tensor | tuple[Tensor, Tensor],
                mask: Tensor | None, grid: tuple[int, int], attention: AttentionFunction) -> Tensor:
        """x (B, N, C), t0 (B, 6, C) float32; context and mask as in CrossAttention."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.scale_shift(t0)
        h = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid, attention)
        x = add_gated(x, gate_msa, h)
        x = x + self.cross_attn(x, context, mask, attention)
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return add_gated(x, gate_mlp, h)


class FinalLayer(ScaleShift):
    """Tokens to patches of pixels: x (B, N, C), t (B, C) -> (B, N, p * p * out_channels).

    It takes the time vector itself, not the output of the shared adaLN layer.
    """

    def __init__(self, config: PixArtConfig, operations: Any, **factory: Any) -> None:
        super().__init__(2, config.hidden_size, operations, factory.get("device"))
        patch = config.patch_size**2 * config.out_channels
        self.norm_final = operations.LayerNorm(config.hidden_size, elementwise_affine=False,
                                               eps=1e-6, **factory)
        self.linear = operations.Linear(config.hidden_size, patch, **factory)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = self.scale_shift(t[:, None])
        # once per pass, so float32 to the last layer is cheap, and no later layer evens it out
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        h = modulate(self.norm_final(wide), shift, scale)
        return self.linear(h.to(x.dtype))
