"""The rows of `pixart inspect`: one function per kind of model."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, detect_config, identify, read_checkpoint
from ..checkpoint.controlnet import detect_controlnet, split_controlnet
from ..checkpoint.convert import layout_of, strip_prefix
from ..checkpoint.identify import KINDS, UNKNOWN
from ..checkpoint.shapes import facts_from_shapes
from ..config import METADATA_KEY, PRESETS, PixArtConfig, fields_from_metadata
from ..text.embeddings import EMBEDDINGS_KEY, load_embeddings
from .describe_lora import NOT_USABLE, describe_lora
from .describe_quantized import describe_quantized
from .rows import Row, as_text, shorten

_T5_WIDTHS = {512: ", of T5 small", 768: ", of T5 base", 1024: ", of T5 large", 2048: ", of T5 XL",
              4096: ", of T5 XXL"}


def describe(path: Path, fields: dict[str, Any]) -> list[Row]:
    """What a file or folder holds, as rows; `fields` are config fields the caller knows.

    Raises CheckpointError for files that cannot be read, ValueError for fields that do not fit.
    """
    checkpoint = read_checkpoint(path, keep_packed=True)
    if EMBEDDINGS_KEY in checkpoint.metadata:
        if fields:
            raise ValueError(f"--set is for PixArt transformers; {path.name} holds encoded prompts")
        return _embeddings(checkpoint)
    kind = identify(checkpoint.state_dict)
    known = next((k for k in KINDS if k.name == kind), UNKNOWN)
    rows = [Row("kind", known.description, "tensor names"), *_sizes(checkpoint),
            *describe_quantized(checkpoint.packed)]
    detail: Callable[[Checkpoint], list[Row]] | None = _DETAILS.get(kind)
    if kind in ("pixart", "pixart-diffusers"):
        rows += _transformer(checkpoint, fields)
    elif fields:
        raise ValueError(f"--set is for PixArt transformers; {path.name} is {known.description}")
    elif detail is not None:
        rows += detail(checkpoint)
    rows += _metadata(checkpoint, METADATA_KEY)
    usable = all(row.name != NOT_USABLE for row in rows)
    return [*rows, Row("use", known.advice)] if usable else rows


def _metadata(checkpoint: Checkpoint, known: str) -> list[Row]:
    return [Row(f"metadata {name}", shorten(value), "file header")
            for name, value in sorted(checkpoint.metadata.items()) if name != known]


def _embeddings(checkpoint: Checkpoint) -> list[Row]:
    """Prompts that T5 has encoded: what they say, how many tokens, and which T5 it was."""
    entries, info = load_embeddings(checkpoint.path)
    rows = [Row("kind", "prompts encoded by T5", f"metadata {EMBEDDINGS_KEY}"),
            *_sizes(checkpoint)]
    rows += [Row(name, shorten(as_text(value)), "as it was saved") for name, value in info.items()]
    for number, entry in enumerate(entries, start=1):
        which = f" of conditioning {number}" if len(entries) > 1 else ""
        count, length, width = entry.caption.shape
        tokens = [length] * count if entry.mask is None else entry.mask.bool().sum(1).tolist()
        rows += [Row(f"tokens{which}", ", ".join(map(str, tokens)), "shapes and mask"),
                 Row(f"width{which}", f"{width}{_T5_WIDTHS.get(width, '')}", "shapes")]
        rows += [Row(f"{name}{which}", as_text(value), "as it was saved")
                 for name, value in entry.options.items() if value is not None]
        rows += [Row(f"{name}{which}", f"a tensor of shape {tuple(tensor.shape)}", "shapes")
                 for name, tensor in entry.tensors.items()]
    return [*rows, *_metadata(checkpoint, EMBEDDINGS_KEY),
            Row("use", "draw with it: `pixart generate --embeddings`, or PixArt Load Embeddings")]


def _sizes(checkpoint: Checkpoint) -> list[Row]:
    values, size = Counter(), 0
    for name, tensor in checkpoint.state_dict.items():
        packed = checkpoint.packed.get(name)
        stored = packed.packing if packed else str(tensor.dtype).removeprefix("torch.")
        values[stored] += tensor.numel()
        size += packed.nbytes if packed else tensor.nbytes
    dtypes = ", ".join(f"{dtype}" if len(values) == 1 else f"{dtype} ({count:,})"
                       for dtype, count in values.most_common())
    return [Row("parameters", f"{sum(values.values()):,} in {len(checkpoint.state_dict)} tensors"),
            Row("dtype", dtypes), Row("size", f"{size / 2**20:,.1f} MiB")]


def _transformer(checkpoint: Checkpoint, fields: dict[str, Any]) -> list[Row]:
    bare = strip_prefix(checkpoint.state_dict)
    layout = "native (as released in .pth files)" if layout_of(bare) == "native" else "diffusers"
    first = next(iter(bare))
    prefix = next(n for n in checkpoint.state_dict if n.endswith(first)).removesuffix(first)
    rows = [Row("layout", layout + (f", prefixed {prefix!r}" if prefix else ""), "tensor names")]
    facts = facts_from_shapes(bare)
    with _notes() as notes:
        try:
            config = detect_config(checkpoint.state_dict, checkpoint.metadata,
                                   config=checkpoint.config,
                                   pipeline_class=checkpoint.pipeline_class, **fields)
        except ValueError as error:
            if set(fields) or "attention heads" not in str(error):
                raise
            return [*rows, *(Row(n, str(v), "shapes") for n, v in facts.items()),
                    Row("num_heads", "unknown", str(error))]
    rows.append(Row("released as", _preset(config), "its config"))
    stored = fields_from_metadata(checkpoint.metadata)
    for name, value in dataclasses.asdict(config).items():
        rows.append(Row(name, as_text(value), _source(name, facts, fields, stored, checkpoint)))
    return [*rows, Row("position range", f"0 to {config.position_range:g}",
                       "base_size / pe_interpolation"),
            Row("latent scale", f"{config.latent_scale:g}", "variant"),
            *(Row("note", note, "detection") for note in notes)]


def _preset(config: PixArtConfig) -> str:
    return next((name for name, preset in PRESETS.items() if preset == config),
                "none of the released models")


def _source(name: str, facts: dict[str, Any], given: dict[str, Any], stored: dict[str, Any],
            checkpoint: Checkpoint) -> str:
    if name in facts:
        return "shapes"
    if name in given:
        return "--set"
    if name in stored:
        return f"metadata {METADATA_KEY}"
    if name == "num_heads":
        heads = {"num_attention_heads", "attention_head_dim"} & checkpoint.config.keys()
        return "config.json" if heads else "width 1152 has 16"
    if name in ("image_size", "base_size", "pe_interpolation"):
        if "pos_embed" in strip_prefix(checkpoint.state_dict):
            return "stored position table"
        return "config.json" if "sample_size" in checkpoint.config else "default"
    if name == "variant":
        return "shapes, position table or config.json"
    return "variant" if name == "max_tokens" else "default"


@contextmanager
def _notes() -> Iterator[list[str]]:
    """What detection logs while this is open."""
    notes: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger = logging.getLogger(detect_config.__module__)
    keeper, level, propagate = Keeper(), logger.level, logger.propagate
    logger.addHandler(keeper)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(keeper)
        logger.setLevel(level)
        logger.propagate = propagate


def _t5(checkpoint: Checkpoint) -> list[Row]:
    from ..text import read_t5

    file = read_t5(checkpoint.path)
    rows = [Row(name, as_text(value), "shapes and config.json")
            for name, value in dataclasses.asdict(file.config).items()]
    where = "in the file or beside it" if file.spiece_model else (
        file.tokenizer_json.name if file.tokenizer_json else "none; name one with --tokenizer")
    return [*rows, Row("tokenizer", where)]


def _vae(checkpoint: Checkpoint) -> list[Row]:
    from ..vae_layout import kl_config, kl_state_dict

    config = kl_config(kl_state_dict(checkpoint.state_dict))
    rows = [Row(name, as_text(config[name]), "shapes")
            for name in ("latent_channels", "block_out_channels", "layers_per_block")]
    scale = checkpoint.config.get("scaling_factor")
    return [*rows, Row("scaling_factor", str(scale), "config.json")] if scale else rows


def _tiny(checkpoint: Checkpoint) -> list[Row]:
    tensors = checkpoint.state_dict
    # a file of one half has no part in its names; only an encoder begins at layer 0
    half = {"0.weight": "encoder", "1.weight": "decoder"}
    parts = [part for part in ("encoder", "decoder")
             if any(name.startswith((f"taesd_{part}.", f"{part}.")) for name in tensors)
             or any(half.get(name) == part for name in tensors)]
    rows = [Row("parts", " and ".join(parts), "tensor names")]
    if len(parts) == 1:
        other = "decoder" if parts == ["encoder"] else "encoder"
        rows.append(Row("other half", f"belongs beside it, as taesd_{other}.safetensors"))
    return rows + [Row(name, f"{tensors[name].item():g}", "tensor")
                   for name in ("vae_scale", "vae_shift") if name in tensors]


def _lora(checkpoint: Checkpoint) -> list[Row]:
    return describe_lora(checkpoint.path)


def _controlnet(checkpoint: Checkpoint) -> list[Row]:
    parts = split_controlnet(checkpoint.state_dict)
    rows = [Row("layout", parts.layout, "tensor names"),
            Row("carries its base model", as_text(bool(parts.base)), "tensor names")]
    try:
        config = detect_controlnet(parts, checkpoint.metadata, checkpoint.config)
    except ValueError as error:
        copies = {name.split(".")[1] for name in parts.control}
        return [*rows, Row("copied blocks", str(len(copies)), "tensor names"),
                Row("not known", str(error))]
    values = dataclasses.asdict(config)
    rows.append(Row("copied blocks", str(values.pop("depth")), "tensor names"))
    stored = fields_from_metadata(checkpoint.metadata)
    return rows + [Row(name, as_text(value), f"metadata {METADATA_KEY}" if name in stored else
                       "its base model" if name in ("variant", "image_size") and parts.base else
                       "shapes" if name != "num_heads" else "width 1152 has 16")
                   for name, value in values.items()]


_DETAILS: dict[str, Callable[[Checkpoint], list[Row]]] = {
    "t5": _t5, "vae": _vae, "taesd": _tiny, "lora": _lora, "controlnet": _controlnet,
    "controlnet-diffusers": _controlnet,
}
