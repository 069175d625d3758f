"""What the shapes of a PixArt transformer prove, in native or diffusers names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import KVCompression

_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.")
_SR = re.compile(r"blocks\.(\d+)\.attn\.sr\.weight")


def facts_from_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every config field that a shape or the presence of a name decides.

    `max_tokens` and `kv_compression` are among them only where their tensors exist.

    Raises ValueError naming the tensors that are missing or have no possible shape.
    """
    patches = _find(state_dict, "x_embedder.proj.weight", "pos_embed.proj.weight", 4)
    output = _find(state_dict, "final_layer.linear.weight", "proj_out.weight", 2)
    caption = _find(state_dict, "y_embedder.y_proj.fc1.weight",
                    "caption_projection.linear_1.weight", 2)
    hidden, in_channels, patch, patch_w = patches.shape
    if patch != patch_w or output.shape[0] % (patch * patch):
        raise ValueError(f"patches of {patch} x {patch_w} and {output.shape[0]} output values for "
                         "each do not fit together; this is not a PixArt transformer")
    facts = {
        "hidden_size": hidden,
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": output.shape[0] // (patch * patch),
        "caption_channels": caption.shape[1],
        "micro_conditioning": any("csize_embedder." in k or "resolution_embedder." in k
                                  or "ar_embedder." in k or "aspect_ratio_embedder." in k
                                  for k in state_dict),
        **block_facts(state_dict),
    }
    null_caption = _null_caption(state_dict)
    if null_caption is not None:
        facts["max_tokens"] = null_caption.shape[0]
    empty = [k for k, v in facts.items() if v == 0 and not isinstance(v, bool)]
    if empty:
        raise ValueError(f"the weights make {', '.join(empty)} zero; the file is damaged")
    return facts


def block_facts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the blocks alone decide, in native or diffusers names; raises as above."""
    mlp = _find(state_dict, "blocks.0.mlp.fc1.weight",
                "transformer_blocks.0.ff.net.0.proj.weight", 2)
    facts = {
        "depth": _depth(state_dict),
        "mlp_hidden_size": mlp.shape[0],
        "qk_norm": any(".q_norm." in k for k in state_dict),
    }
    compression = _compression(state_dict)
    if compression is not None:
        facts["kv_compression"] = compression
    return facts


def _find(state_dict: Mapping[str, Tensor], native: str, diffusers: str, ndim: int) -> Tensor:
    name = native if native in state_dict else diffusers
    tensor = state_dict.get(name)
    if tensor is None:
        raise ValueError(f"{native} (diffusers: {diffusers}) is missing; this is not a complete "
                         "PixArt transformer")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {ndim} dimensions were expected")
    return tensor


def _null_caption(state_dict: Mapping[str, Tensor]) -> Tensor | None:
    for name in ("y_embedder.y_embedding", "caption_projection.y_embedding"):
        if name in state_dict:
            return _find(state_dict, name, name, 2)
    return None


def _depth(state_dict: Mapping[str, Tensor]) -> int:
    found = {int(match[1]) for match in map(_BLOCK.match, state_dict) if match}
    missing = [i for i in range(len(found)) if i not in found]
    if missing:
        raise ValueError(f"blocks {missing[:5]} are missing, though there are later ones up to "
                         f"{max(found)}; the file is incomplete")
    return len(found)


def _compression(state_dict: Mapping[str, Tensor]) -> KVCompression | None:
    found = {int(match[1]): state_dict[match[0]]
             for match in map(_SR.fullmatch, state_dict) if match}
    if not found:
        return None
    shapes = {tuple(tensor.shape) for tensor in found.values()}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 4 or shape[2] != shape[3] or shape[2] < 2:
        raise ValueError(f"KV-compression kernels have the shapes {sorted(shapes)}; one square "
                         "kernel of 2 or more was expected")
    return KVCompression("conv", shape[2], tuple(found))
