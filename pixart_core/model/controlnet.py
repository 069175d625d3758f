"""ControlNet-Transformer of PixArt-delta (arXiv 2401.05252, section 4), wired as its code runs.

Frozen block 0 runs alone. The first copied block reads its output plus the projected control
tokens, every later copy the output of the copy before it, and copy i, through its zero-initialised
projection, is added to what enters frozen block i + 1. So all residuals follow from the tokens
after block 0 and are computed in one pass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..config import ControlNetConfig, PixArtConfig
from .blocks import BlockInputs, PixArtBlock

if TYPE_CHECKING:
    from .transformer import PixArtTransformer

ControlMode = Literal["balanced", "prompt", "control"]
CONTROL_MODES: tuple[ControlMode, ...] = ("balanced", "prompt", "control")
_SOFTEST = 0.825**12  # of the 13 residuals of a U-Net ControlNet, the first, where modes come from


class ControlBlock(nn.Module):
    """One copied block with its projections; only the first has one for the control tokens.

    Projections start at zero and stay small: in a model of 8-bit weights they are bfloat16, or
    most of what was trained would be rounded away.
    """

    def __init__(self, config: ControlNetConfig, index: int, operations: Any,
                 **factory: Any) -> None:
        super().__init__()
        size, compression = config.hidden_size, config.kv_compression
        compressed = compression is not None and index in compression.layers
        self.copied_block = PixArtBlock(config, compression if compressed else None, operations,
                                        **factory)
        if factory["dtype"] is not None and factory["dtype"].itemsize == 1:
            factory["dtype"] = torch.bfloat16
        if index == 0:
            self.before_proj = operations.Linear(size, size, **factory)
        self.after_proj = operations.Linear(size, size, **factory)


class PixArtControlNet(nn.Module):
    """The copied blocks of a ControlNet-Transformer; parameter names are those of its `.pth`.

    It has no embedders: control tokens, time and caption come from the transformer it steers.
    `dtype`, `device` and `operations` as in PixArtTransformer.
    """

    def __init__(self, config: ControlNetConfig, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None, operations: Any = None) -> None:
        super().__init__()
        self.config = config
        self.controlnet = nn.ModuleList(
            ControlBlock(config, i, operations or nn, dtype=dtype, device=device)
            for i in range(config.depth)
        )

    @classmethod
    def from_base(cls, transformer: PixArtTransformer, depth: int = 13) -> PixArtControlNet:
        """A new ControlNet for `transformer`: copies of its first `depth` blocks, all else zero.

        It changes nothing until it is trained. Raises ValueError for a depth that does not leave
        a block to steer.
        """
        base = transformer.config
        if not 0 < depth < base.depth:
            raise ValueError(f"depth is {depth}; a model of {base.depth} blocks takes 1 to "
                             f"{base.depth - 1} copied ones")
        compression = base.kv_compression
        if compression is not None:
            layers = tuple(i for i in compression.layers if i < depth)
            compression = dataclasses.replace(compression, layers=layers) if layers else None
        config = ControlNetConfig(
            base.hidden_size, depth, base.num_heads, base.mlp_hidden_size, base.qk_norm,
            compression, base.variant, base.image_size)
        weight = transformer.x_embedder.proj.weight
        net = cls(config, dtype=weight.dtype, device=weight.device)
        for block, original in zip(net.controlnet, transformer.blocks[:depth], strict=True):
            block.copied_block = copy.deepcopy(original)
        for name, parameter in net.named_parameters():
            if "_proj." in name and "copied_block" not in name:
                nn.init.zeros_(parameter)
        return net

    def forward(self, tokens: Tensor, control: Tensor, inputs: BlockInputs) -> list[Tensor]:
        """What enters frozen blocks 1, 2, ... in addition, (B, N, C) each.

        `tokens` (B, N, C) are the output of frozen block 0, `control` (B or 1, N, C) the embedded
        control latent, `inputs` those of the frozen blocks, with the projected caption (B, L, C)
        as context.
        """
        hidden = self.enter(tokens, control)
        residuals = []
        for index, block in enumerate(self.controlnet):
            hidden = self.run_copy(index, hidden, inputs)
            residuals.append(block.after_proj(hidden))
        return residuals

    def enter(self, tokens: Tensor, control: Tensor) -> Tensor:
        """What the first copied block reads, (B, N, C)."""
        return tokens + self.controlnet[0].before_proj(control)

    def run_copy(self, index: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, N, C) through one copied block."""
        return self.controlnet[index].copied_block(hidden, inputs.t0, inputs.context, inputs.mask,
                                                   inputs.grid, inputs.attention)


@dataclass(frozen=True)
class Control:
    """One ControlNet at work in a forward pass.

    `latent` (1 or B, 4, H, W) is the encoded and scaled control image, of the size of x.
    `strength` multiplies every residual, `weights` one for each copied block (see
    `mode_weights`). `rows` are the samples of the batch it steers, None for all: in a guidance
    batch the conditional half alone.
    """

    net: PixArtControlNet
    latent: Tensor
    strength: float = 1.0
    weights: tuple[float, ...] | None = None
    rows: slice | None = None

    def scale(self, index: int) -> float:
        """The factor of the residual of copied block `index`."""
        return self.strength * (self.weights[index] if self.weights else 1.0)


def mode_weights(mode: ControlMode, depth: int) -> tuple[float, ...]:
    """The factor of each copied block's residual in a control mode.

    "balanced" takes all as they are. "prompt" and "control" fade the early ones, as the control
    modes of other models do: 0.825 ** 12 for the first, rising geometrically to 1 for the last.
    "control" is meant for the conditional half of a guidance batch, where guidance
    then multiplies what the control adds.

    Raises ValueError for another mode.
    """
    if mode not in CONTROL_MODES:
        raise ValueError(f"control mode is {mode!r}; use one of {', '.join(CONTROL_MODES)}")
    if mode == "balanced" or depth == 1:
        return (1.0,) * depth
    return tuple(_SOFTEST ** ((depth - 1 - i) / (depth - 1)) for i in range(depth))


def control_residuals(controls: Sequence[Control], latents: Sequence[Tensor], tokens: Tensor,
                      inputs: BlockInputs) -> tuple[Tensor, ...]:
    """The summed residuals of all `controls`, (B, N, C) for each frozen block from 1 on.

    `latents` are their embedded control latents (B or 1, N, C), `tokens` the output of frozen
    block 0, `inputs` those of the frozen blocks with the projected caption as context. However
    many controls there are, one set of residuals is alive.
    """
    total: list[Tensor] = []
    for control, latent in zip(controls, latents, strict=True):
        net, rows, own, entering = control.net, control.rows, inputs, tokens
        if rows is not None:
            own, entering = inputs.of_rows(rows), tokens[rows]
            latent = latent if latent.shape[0] == 1 else latent[rows]
        hidden = net.enter(entering, latent)
        for index, block in enumerate(net.controlnet):
            hidden = net.run_copy(index, hidden, own)
            residual, scale = block.after_proj(hidden), control.scale(index)
            first = index == len(total)
            if rows is None:
                residual = residual if scale == 1.0 else residual * scale
                added = residual if first else total[index] + residual
            else:
                steered = torch.arange(len(tokens), device=tokens.device)[rows]
                sum_so_far = torch.zeros_like(tokens) if first else total[index]
                added = sum_so_far.index_add(0, steered, residual, alpha=scale)
            if first:
                total.append(added)
            else:
                total[index] = added
    return tuple(total)


def check_dtype(controls: Sequence[Control], dtype: torch.dtype) -> None:
    """Raise ValueError when a control's layers cannot compute in the transformer's `dtype`."""
    for control in controls:
        own = control.net.controlnet[0].after_proj.weight.dtype
        if own != dtype:
            raise ValueError(f"the ControlNet is {own}, the transformer {dtype}; load both with "
                             "one dtype=...")


def check_controls(controls: Sequence[Control], config: PixArtConfig, x: Tensor) -> None:
    """Raise ValueError when a control cannot steer a model of `config` at latents like `x`."""
    for control in controls:
        check_fit(control.net.config, config)
        shape = tuple(control.latent.shape)
        if control.latent.ndim != 4 or shape[1:] != x.shape[1:] or shape[0] not in (1, len(x)):
            raise ValueError(f"control latent of shape {shape} given, (1 or {len(x)}, "
                             f"{', '.join(map(str, x.shape[1:]))}) expected")
        if control.weights is not None and len(control.weights) != control.net.config.depth:
            raise ValueError(f"{len(control.weights)} control weights given for "
                             f"{control.net.config.depth} copied blocks")


def check_fit(control: ControlNetConfig, base: PixArtConfig) -> None:
    """Raise ValueError when a ControlNet cannot steer a transformer: another width, too deep."""
    mine = (control.hidden_size, control.num_heads)
    if mine != (base.hidden_size, base.num_heads):
        raise ValueError(f"the ControlNet was made for a PixArt model {mine[0]} wide with {mine[1]}"
                         f" heads, this one is {base.hidden_size} wide with {base.num_heads}; use "
                         "the ControlNet that belongs to the model")
    if control.depth >= base.depth:
        raise ValueError(f"the ControlNet has {control.depth} copied blocks, which need a PixArt "
                         f"model of more blocks than that; this one has {base.depth}")


def trained_for_another(control: ControlNetConfig, base: PixArtConfig) -> str | None:
    """What to warn of when a ControlNet fits a model of the other variant; None otherwise."""
    if control.variant in (None, base.variant):
        return None
    return (f"the ControlNet was trained for PixArt-{control.variant}, the model is "
            f"PixArt-{base.variant}: its control image is encoded by another VAE than it knows")
