"""Layouts of ControlNet files: PixArt-delta's own and diffusers' (SimpleTuner's too), both ways."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..config import METADATA_KEY, ControlNetConfig, PixArtConfig, fields_from_metadata
from .convert import Layout, convert_state_dict
from .detect import detect_config, head_count
from .fields import checked_fields
from .shapes import block_facts

logger = logging.getLogger(__name__)

_NATIVE = re.compile(r"(?P<prefix>.*?)controlnet\.(?P<index>\d+)\."
                     r"(?P<inner>copied_block\.|before_proj\.|after_proj\.)(?P<rest>.+)")
_DIFFUSERS = re.compile(r"(?P<prefix>.*?)controlnet_blocks\.(?P<index>\d+)\."
                        r"(?P<inner>transformer_block\.|before_proj\.|after_proj\.)(?P<rest>.+)")
_FIELDS = ("num_heads", "kv_compression", "variant", "image_size")


class ControlNetParts(NamedTuple):
    """Native control tensors; those of the base model in the same file, {} if none; the layout."""

    control: dict[str, Tensor]
    base: dict[str, Tensor]
    layout: Layout


def split_controlnet(state_dict: Mapping[str, Tensor]) -> ControlNetParts:
    """Take a ControlNet file apart: native control tensors, and the base model beside them.

    The original `.pth` holds its whole base as `base_model.*`, a saved diffusers wrapper as
    `transformer.*`; any prefix before that is dropped. Raises ValueError for names that belong to
    neither, and for a mixture of layouts.
    """
    matches = {name: _NATIVE.fullmatch(name) or _DIFFUSERS.fullmatch(name) for name in state_dict}
    found = {name: match for name, match in matches.items() if match}
    if not found:
        raise ValueError("no copied block (controlnet.0.copied_block or "
                         "controlnet_blocks.0.transformer_block) was found; this is not a PixArt "
                         "ControlNet")
    layouts = {match.re for match in found.values()}
    prefixes = {match["prefix"] for match in found.values()}
    if len(layouts) > 1 or len(prefixes) > 1:
        names = ", ".join([next(n for n in found if found[n]["prefix"] == prefix)
                           for prefix in sorted(prefixes)])
        raise ValueError(f"the tensors of more than one ControlNet are mixed: {names}")
    native = layouts == {_NATIVE}
    root = prefixes.pop()
    if not native:
        root = root.removesuffix("controlnet.")  # diffusers' wrapper around adapter and transformer
    beside = "base_model." if native else "transformer."
    base = {name[len(root + beside):]: tensor for name, tensor in state_dict.items()
            if name not in found and name.startswith(root + beside)}
    others = [name for name in state_dict
              if name not in found and not name.startswith(root + beside)]
    if others:
        raise ValueError(f"{len(others)} names do not belong to a PixArt ControlNet: "
                         f"{', '.join(others[:5])}")
    bare = {f"{match['index']}.{match['inner']}{match['rest']}": state_dict[name]
            for name, match in found.items()}
    return ControlNetParts(_control(bare, native), base, "native" if native else "diffusers")


def _control(bare: Mapping[str, Tensor], native: bool) -> dict[str, Tensor]:
    if native:
        return {f"controlnet.{name}": tensor for name, tensor in bare.items()}
    blocks = {f"transformer_blocks.{name.replace('.transformer_block', '', 1)}": tensor
              for name, tensor in bare.items() if ".transformer_block." in name}
    copies = convert_state_dict(blocks, to="native")
    out = {f"controlnet.{name}": tensor for name, tensor in bare.items() if "_proj." in name
           and ".transformer_block." not in name}
    for name, tensor in copies.items():
        index, rest = name.removeprefix("blocks.").split(".", 1)
        out[f"controlnet.{index}.copied_block.{rest}"] = tensor
    return out


def join_controlnet(control: Mapping[str, Tensor], to: Layout) -> dict[str, Tensor]:
    """Native control tensors, from `split_controlnet`, under the names of layout `to`.

    Fused projections become views of the same memory in diffusers' names. Raises ValueError for
    KV-compression weights, which have no diffusers form.
    """
    if to == "native":
        return dict(control)
    copies = convert_state_dict(as_blocks(control), to="diffusers")
    out = {name.replace("controlnet.", "controlnet_blocks.", 1): tensor
           for name, tensor in control.items() if ".copied_block." not in name}
    for name, tensor in copies.items():
        index, rest = name.removeprefix("transformer_blocks.").split(".", 1)
        out[f"controlnet_blocks.{index}.transformer_block.{rest}"] = tensor
    return out


def as_blocks(control: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The copied blocks of native control tensors under the names of the base's own blocks."""
    return {name.replace("controlnet.", "blocks.", 1).replace(".copied_block", "", 1): tensor
            for name, tensor in control.items() if ".copied_block." in name}


def detect_controlnet(parts: ControlNetParts, metadata: Mapping[str, str] | None = None,
                      config: Mapping[str, Any] | None = None,
                      like: PixArtConfig | None = None, **fields: Any) -> ControlNetConfig:
    """The config of a ControlNet; `fields` are those the caller knows better.

    `metadata` is a safetensors header's, `config` a config.json beside the file, `like` the
    transformer it is for, whose head count serves where nothing tells one. What it was trained
    for (`variant`, `image_size`) is read off the base in the same file where nothing else tells.
    Raises ValueError when tensors are missing, a field contradicts a shape, or the head
    count cannot be known.
    """
    facts = block_facts(as_blocks(parts.control))
    projection = parts.control.get("controlnet.0.after_proj.weight")
    if projection is None:
        raise ValueError("controlnet.0.after_proj.weight is missing; this is not a complete "
                         "PixArt ControlNet")
    facts["hidden_size"] = projection.shape[0]
    given = checked_fields(fields, "the caller")
    stored = checked_fields(fields_from_metadata(metadata), f"metadata {METADATA_KEY!r}")
    for name, value in given.items():
        if name not in (*_FIELDS, *facts):
            raise ValueError(f"{name}={value!r} was given; a ControlNet has {', '.join(_FIELDS)}")
        if facts.get(name, value) != value:
            raise ValueError(f"{name}={value!r} was given, but the weights have "
                             f"{name}={facts[name]!r}; leave {name} out")
    known = {**{k: v for k, v in stored.items() if k in _FIELDS}, **given, **facts}
    try:
        known["num_heads"] = head_count(known, config or {})
    except ValueError:
        if like is None or like.hidden_size != known["hidden_size"]:
            raise
        known["num_heads"] = like.num_heads
    if parts.base and "variant" not in known:
        known.update(_trained_for(parts.base, known["num_heads"]))
    return ControlNetConfig(**known)


def _trained_for(base: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """variant and image_size of a base model, as far as it tells them."""
    tells_size = "pos_embed" in base or any("csize_embedder." in name for name in base)
    try:
        whole = detect_config(base, num_heads=heads, image_size=None if tells_size else 1024)
    except ValueError as error:
        logger.info("the base model in the ControlNet's file is not complete: %s", error)
        return {}
    return {"variant": whole.variant, **({"image_size": whole.image_size} if tells_size else {})}
