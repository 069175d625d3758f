"""From tensor names and shapes, and what is written beside them, to a PixArtConfig.

Order of trust: shapes are facts; the caller's fields decide everything that shapes leave open; then
the file's own `pixart_config` metadata, then config.json, then one default that is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import MAX_TOKENS, METADATA_KEY, KVCompression, PixArtConfig, fields_from_metadata
from .convert import strip_prefix
from .fields import checked_fields
from .position import Positions, stored_positions
from .shapes import facts_from_shapes

logger = logging.getLogger(__name__)

_XL_WIDTH, _XL_HEADS = 1152, 16
_TRANSFORMER_CLASSES = (None, "Transformer2DModel", "PixArtTransformer2DModel")


def detect_config(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *,
                  config: Mapping[str, Any] | None = None, pipeline_class: str | None = None,
                  **fields: Any) -> PixArtConfig:
    """The config of a PixArt transformer in native, diffusers or prefixed names.

    `metadata` is a safetensors header's, `config` a diffusers config.json, `pipeline_class` the
    `_class_name` of the pipeline it came from. `fields` are PixArtConfig fields the caller knows
    better; None stands for "not given". `image_size` alone implies the released model of that
    size.

    Raises ValueError when tensors are missing (naming them), when a field contradicts a shape, and
    when the head count cannot be known.
    """
    state_dict = strip_prefix(state_dict)
    facts = facts_from_shapes(state_dict)
    given = checked_fields(fields, "the caller")
    stored = checked_fields(fields_from_metadata(metadata), f"metadata {METADATA_KEY!r}")
    beside = dict(config or {})
    if beside.get("_class_name") not in _TRANSFORMER_CLASSES:
        logger.info("config.json describes %r, not a PixArt transformer; it is not used",
                    beside["_class_name"])
        beside = {}

    for name, fact in facts.items():
        if given.get(name, fact) != fact:
            raise ValueError(f"{name}={given[name]!r} was given, but the weights have "
                             f"{name}={fact!r}; leave {name} out")
        if stored.get(name, fact) != fact:
            logger.warning("metadata says %s=%r, the weights have %r; the weights count",
                           name, stored[name], fact)
    known = {**stored, **given, **facts}
    known["num_heads"] = head_count(known, beside)
    table = stored_positions(state_dict.get("pos_embed"), facts)
    if "variant" not in known:
        known["variant"] = _variant(facts, table, beside, pipeline_class)
    known.setdefault("max_tokens", MAX_TOKENS[known["variant"]])
    known.update(_positions(known, table, given, stored, beside))
    known["kv_compression"] = _kv_compression(facts, given, stored)
    return PixArtConfig().replace(**known)


def head_count(known: Mapping[str, Any], beside: Mapping[str, Any]) -> int:
    """The number of heads of a model `known["hidden_size"]` wide, from `known` or a config.json.

    Heads cannot be seen in a shape: every split of the width multiplies the same matrices. Raises
    ValueError where nothing tells it, or it does not divide the width.
    """
    width = known["hidden_size"]
    heads, head_dim = beside.get("num_attention_heads"), beside.get("attention_head_dim")
    if "num_heads" in known:
        heads, source = known["num_heads"], "num_heads"
    elif _is_count(heads) and (not _is_count(head_dim) or heads * head_dim == width):
        source = "config.json num_attention_heads"
    elif _is_count(head_dim) and width % head_dim == 0:
        heads, source = width // head_dim, "config.json attention_head_dim"
    elif width == _XL_WIDTH:
        return _XL_HEADS
    else:
        raise ValueError(f"the number of attention heads of a model {width} wide cannot be read "
                         f"from its weights; pass num_heads=..., or store it in the file's "
                         f"{METADATA_KEY!r} metadata: pixart convert IN OUT --set num_heads=N")
    if width % heads:
        raise ValueError(f"{source} is {heads}, which does not divide the width {width}")
    return heads


def _variant(facts: Mapping[str, Any], table: Positions | None, beside: Mapping[str, Any],
             pipeline_class: str | None) -> str:
    """alpha or sigma, from the clearest sign there is."""
    if facts["micro_conditioning"]:
        return "alpha"  # no Sigma model has size embedders
    for variant, tokens in MAX_TOKENS.items():
        if facts.get("max_tokens") == tokens:
            return variant
    if table is not None and table.image_size == 256:
        return "alpha" if table.position_range == 16 else "sigma"
    for text in (pipeline_class, beside.get("_name_or_path")):
        words = text.lower() if isinstance(text, str) else ""
        for variant in ("sigma", "alpha"):  # Sigma's files stand under the owner PixArt-alpha
            if variant in words:
                return variant
    if beside.get("use_additional_conditions") is True:
        return "alpha"
    if beside.get("sample_size") == 32:
        return "sigma" if beside.get("interpolation_scale") == 0.5 else "alpha"
    if beside.get("sample_size") == 256:
        return "sigma"  # there is no 2K alpha
    logger.warning("nothing in the file tells PixArt-alpha from PixArt-Sigma; taking sigma (pass "
                   "variant='alpha' for the other, which has another VAE and token limit)")
    return "sigma"


def _positions(known: Mapping[str, Any], table: Positions | None, given: Mapping[str, Any],
               stored: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """image_size, base_size and pe_interpolation: the last source that speaks of them decides."""
    variant, patch = known["variant"], known["patch_size"]
    in_file = {} if table is None else {"image_size": table.image_size,
                                        "base_size": table.base_size,
                                        "pe_interpolation": table.pe_interpolation}
    for name, value in in_file.items():
        if stored.get(name, value) != value:
            logger.warning("metadata says %s=%r, pos_embed was made for %r; pos_embed counts",
                           name, stored[name], value)
    sources = (_from_config_json(beside, patch), stored, in_file, given)
    position = _complete({"image_size": 1024}, variant, patch)
    if not any(_names_a_size(source) for source in sources):
        logger.info("nothing in the file tells its training size; taking 1024 pixels (pass "
                    "image_size=... for another)")
    for source in sources:
        if _names_a_size(source):
            position = _complete(source, variant, patch)
        elif "pe_interpolation" in source:
            position["pe_interpolation"] = source["pe_interpolation"]
    return position


def _names_a_size(source: Mapping[str, Any]) -> bool:
    return "image_size" in source or "base_size" in source


def _complete(source: Mapping[str, Any], variant: str, patch: int) -> dict[str, Any]:
    """Fill in what one source leaves out, as the released models of that size have it."""
    image_size = source.get("image_size") or source["base_size"] * patch * 8
    base_size = source.get("base_size") or max(1, image_size // (8 * patch))
    interpolation = source.get("pe_interpolation") or image_size / 512
    if not source.get("pe_interpolation") and variant == "alpha":
        interpolation = max(interpolation, 1.0)  # alpha-256 was not interpolated
    return {"image_size": image_size, "base_size": base_size, "pe_interpolation": interpolation}


def _from_config_json(beside: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """diffusers' sample_size (latent pixels) and interpolation_scale, with its own default."""
    sample, scale = beside.get("sample_size"), beside.get("interpolation_scale")
    if not _is_count(sample):
        return {}
    if not (isinstance(scale, int | float) and scale > 0):
        scale = max(sample // 64, 1)
    return {"image_size": sample * 8, "base_size": max(1, sample // patch),
            "pe_interpolation": float(scale)}


def _kv_compression(facts: Mapping[str, Any], given: Mapping[str, Any],
                    stored: Mapping[str, Any]) -> KVCompression | None:
    """Only "conv" leaves weights; the other samplings are known from metadata or the caller."""
    if "kv_compression" in facts:
        return facts["kv_compression"]
    compression = given.get("kv_compression")
    if compression is not None and compression.sampling == "conv":
        raise ValueError("kv_compression by convolution was given, but the weights have none "
                         "(blocks.N.attn.sr.weight is missing)")
    if compression is None:
        compression = stored.get("kv_compression")
        if compression is not None and compression.sampling == "conv":
            logger.warning("metadata says that keys and values are compressed by convolution, but "
                           "the weights have none; the weights count")
            return None
    return compression


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
