"""Names of the same weights in the released files ("native") and in diffusers, both ways.

The tables below are the whole knowledge; everything else is bookkeeping around them. Attention
projections are fused in native files (q, k, v stacked on dim 0) and separate in diffusers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Layout = Literal["native", "diffusers"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.")

_TOP: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_BLOCK: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.q_norm",),
    "attn.k_norm": ("attn1.k_norm",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
# raw parameters, without .weight or .bias
_TOP_PARAMETERS = {"final_layer.scale_shift_table": "scale_shift_table"}
_BLOCK_PARAMETERS = {"scale_shift_table": "scale_shift_table"}

_TOP_BACK = {name: (native, i) for native, names in _TOP.items() for i, name in enumerate(names)}
_BLOCK_BACK = {n: (native, i) for native, names in _BLOCK.items() for i, n in enumerate(names)}

_NATIVE_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_NULL_CAPTION = ("y_embedder.y_embedding", "caption_projection.y_embedding")
_DROPPED = ("pos_embed",)
_NO_DIFFUSERS_FORM = re.compile(r"blocks\.\d+\.attn\.(sr|norm)\.(weight|bias)")
_MARKERS = ("t_block.1.weight", "adaln_single.linear.weight", "x_embedder.proj.weight",
            "pos_embed.proj.weight", "controlnet.0.before_proj.weight",
            "controlnet_blocks.0.before_proj.weight")


def diffusers_module(native: str) -> tuple[str, ...] | None:
    """diffusers names of a native module, more than one where native fuses; None if unknown.

    `native` is a module or raw parameter without `.weight` / `.bias`: "blocks.3.attn.qkv" gives
    its to_q, to_k and to_v, in the order in which their rows are stacked.
    """
    match = _NATIVE_BLOCK.fullmatch(native)
    if match is None:
        raw = _TOP_PARAMETERS.get(native)
        return (raw,) if raw else _TOP.get(native)
    index, inner = match.groups()
    raw = _BLOCK_PARAMETERS.get(inner)
    names = (raw,) if raw else _BLOCK.get(inner)
    return names and tuple(f"transformer_blocks.{index}.{name}" for name in names)


def native_module(diffusers: str) -> tuple[str, int, int] | None:
    """(native name, part, number of parts) of a diffusers module; None if unknown.

    "transformer_blocks.3.attn1.to_k" gives ("blocks.3.attn.qkv", 1, 3): the second of three equal
    row groups.
    """
    match = _DIFFUSERS_BLOCK.fullmatch(diffusers)
    if match is None:
        raw = next((n for n, d in _TOP_PARAMETERS.items() if d == diffusers), None)
        if raw:
            return raw, 0, 1
        found = _TOP_BACK.get(diffusers)
        return found and (*found, len(_TOP[found[0]]))
    index, inner = match.groups()
    if inner in _BLOCK_PARAMETERS.values():
        return f"blocks.{index}.{inner}", 0, 1
    found = _BLOCK_BACK.get(inner)
    return found and (f"blocks.{index}.{found[0]}", found[1], len(_BLOCK[found[0]]))


def native_modules(index: int = 0) -> tuple[str, ...]:
    """Native names of all modules and raw parameters, of the blocks those of block `index`.

    Those that diffusers has names for, too: without KV compression.
    """
    block = (*_BLOCK, *_BLOCK_PARAMETERS)
    return (*_TOP, *_TOP_PARAMETERS, *(f"blocks.{index}.{name}" for name in block))


def strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what a host or wrapper put in front (`model.diffusion_model.` and the like).

    A bundle also holds `vae.` or `text_encoders.` tensors; those are left out and logged.
    """
    for prefix in ("", *PREFIXES):
        if any(prefix + marker in state_dict for marker in _MARKERS):
            kept = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
            if len(kept) < len(state_dict):
                logger.info("taking the %d tensors under %r; %d others belong to other models",
                            len(kept), prefix, len(state_dict) - len(kept))
            return kept
    return dict(state_dict)


def layout_of(names: Iterable[str]) -> Layout | None:
    """Whether tensor names (without prefix) are native or diffusers; None for neither.

    Raises ValueError for a mixture.
    """
    native = diffusers = None
    for name in names:
        module = _split_leaf(name)[0]
        if native is None and (name in _NULL_CAPTION[:1] or diffusers_module(module)):
            native = name
        if diffusers is None and (name in _NULL_CAPTION[1:] or native_module(module)):
            diffusers = name
    if native and diffusers:
        raise ValueError(f"native and diffusers names are mixed: {native!r} and {diffusers!r}")
    return "native" if native else "diffusers" if diffusers else None


def convert_state_dict(state_dict: Mapping[str, Tensor], to: Layout, *,
                       keep_null_caption: bool = False) -> dict[str, Tensor]:
    """Rename a PixArt transformer's tensors to the layout `to`; values stay bit for bit.

    Any depth and width. To diffusers, fused projections become views of the same memory, and by
    that format's convention the position table `pos_embed` (recomputed from the config) and the
    null caption `y_embedder.y_embedding` are left out; `keep_null_caption` writes the latter as
    `caption_projection.y_embedding`, a name ComfyUI also reads and diffusers does not.
    A dict that already has the layout comes back as it is, without its prefix.

    Raises ValueError for names that belong to neither layout, incomplete or uneven q, k, v, and
    KV-compression weights, which have no diffusers form.
    """
    if to not in ("native", "diffusers"):
        raise ValueError(f'to is {to!r}; use "native" or "diffusers"')
    state_dict = strip_prefix(state_dict)
    layout = layout_of(state_dict)
    if layout is None:
        _refuse_unknown(list(state_dict) or ["nothing at all"])
    if layout == to:
        return state_dict
    if to == "diffusers":
        return _to_diffusers(state_dict, keep_null_caption)
    return _to_native(state_dict)


def _to_diffusers(state_dict: dict[str, Tensor], keep_null_caption: bool) -> dict[str, Tensor]:
    compressed = [name for name in state_dict if _NO_DIFFUSERS_FORM.fullmatch(name)]
    if compressed:
        raise ValueError(f"{compressed[0]} and {len(compressed) - 1} more are KV-compression "
                         "weights, which diffusers has no form for; keep the native layout")
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        module, leaf = _split_leaf(name)
        targets = diffusers_module(module)
        if name == _NULL_CAPTION[0]:
            if keep_null_caption:
                out[_NULL_CAPTION[1]] = tensor
        elif name in _DROPPED:
            continue
        elif not targets:
            unknown.append(name)
        elif tensor.ndim == 0 or tensor.shape[0] % len(targets):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its rows cannot be split "
                             f"into {len(targets)} equal parts")
        else:
            parts = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
            out.update((target + leaf, part)
                       for target, part in zip(targets, parts, strict=True))
    if unknown:
        _refuse_unknown(unknown)
    return out


def _to_native(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        module, leaf = _split_leaf(name)
        found = native_module(module)
        if name == _NULL_CAPTION[1]:
            out[_NULL_CAPTION[0]] = tensor
        elif name in _DROPPED:
            out[name] = tensor
        elif not found:
            unknown.append(name)
        elif found[2] == 1:
            out[found[0] + leaf] = tensor
        elif found[1] == 0 or found[0] + leaf not in out:
            out[found[0] + leaf] = _fuse(found[0], leaf, state_dict)
    if unknown:
        _refuse_unknown(unknown)
    return out


def _fuse(native: str, leaf: str, state_dict: dict[str, Tensor]) -> Tensor:
    """Stack the separate projections of one fused layer on dim 0."""
    names = [part + leaf for part in diffusers_module(native) or ()]
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing beside {names[-1]}; all of "
                         f"{', '.join(names)} are needed")
    parts = [state_dict[name] for name in names]
    if len({(tuple(part.shape), part.dtype) for part in parts}) > 1 or parts[0].ndim == 0:
        found = ", ".join(f"{n} {p.dtype} {tuple(p.shape)}"
                          for n, p in zip(names, parts, strict=True))
        raise ValueError(f"projections of one layer must have one shape and dtype: {found}")
    return torch.cat(parts)


def _split_leaf(name: str) -> tuple[str, str]:
    for leaf in (".weight", ".bias"):
        if name.endswith(leaf):
            return name[: -len(leaf)], leaf
    return name, ""


def _refuse_unknown(names: list[str]) -> None:
    shown = ", ".join(names[:5])
    raise ValueError(f"{len(names)} names do not belong to a PixArt transformer: {shown}"
                     f"{', ...' if len(names) > 5 else ''}")
