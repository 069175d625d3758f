"""What the engine's modules need in training beside gradients: float32 islands, less memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model import PixArtTransformer
from ..model.blocks import PixArtBlock


def keep_time_path_float32(model: PixArtTransformer) -> None:
    """Run the embedders of time and size and the shared adaLN layer in float32 under autocast.

    As in every half-precision PixArt of this engine: a few rows that every token depends on.
    """
    parts = (model.t_embedder, model.csize_embedder, model.ar_embedder, model.t_block)
    for module in filter(None, parts):
        module.forward = _without_autocast(module.forward)


def attend_in_float32(model: PixArtTransformer) -> None:
    """Run the attention function on float32 queries, keys and values, whatever the layers run in.

    For half precision on a CPU: PyTorch's fused attention takes ten times as long backward in
    bfloat16 there as in float32 (64 tokens of 32 wide heads, AMX), more than everything else.
    """
    inner = model.attention

    def wrapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return inner(q.float(), k.float(), v.float(), mask).to(q.dtype)
    model.attention = wrapped


def checkpoint_blocks(modules: Iterable[nn.Module]) -> None:
    """Let every PixArt block in `modules` be computed again in the backward pass.

    Memory then grows with one block's activations and the tokens between blocks (arXiv
    1604.06174); a step takes about a third longer.
    """
    for module in modules:
        for block in module.modules():
            if isinstance(block, PixArtBlock):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                                  preserve_rng_state=False)


def _without_autocast(forward):
    @functools.wraps(forward)
    def wrapped(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())
    return wrapped
