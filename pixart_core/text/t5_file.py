"""Reading a T5 v1.1 encoder from any file it is handed round in.

Hugging Face folders (whole or in shards), ComfyUI single files (float32, float16, bfloat16 and the
float8 layouts of `fp8.py`) and GGUF files all become one thing: a state dict under Hugging Face's
encoder names, the sizes read from its shapes, and the tokenizer where the file or folder brings
one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.identify import explain
from ..checkpoint.read import CheckpointError, read_checkpoint
from ..quant.stored import StoredWeight
from .fp8 import FP8_DTYPES, plain_weight, split_side_tensors
from .tokenizer import JSON_NAME, SPIECE_NAMES, CaptionTokenizer

logger = logging.getLogger(__name__)

SPIECE_KEY = "spiece_model"
EMBEDDING = "shared.weight"

_EXPECTED = "PixArt needs the encoder of T5 v1.1 XXL (32128 tokens)"
_FOREIGN_VOCABULARIES = {256384: "umT5", 250112: "mT5", 250100: "mT5"}
_EMBEDDING_COPY = "encoder.embed_tokens."
_FIRST_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_FIRST_BLOCK = re.compile(rf"(?P<prefix>(?:.*\.)?){re.escape(_FIRST_QUERY)}")
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")
_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder: `d_model` wide, `num_heads` heads of `d_kv`, `d_ff` in the middle.

    `gated` feed-forward layers have wi_0 (through `activation`) times wi_1, as T5 v1.1 has; the
    others have one wi. The first block alone holds the relative position bias.
    """

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    gated: bool = True
    activation: str = "gelu_new"
    layer_norm_epsilon: float = 1e-6


@dataclass
class T5File:
    """A T5 encoder as read: weights under Hugging Face's names, sizes, tokenizer if there is one.

    `dtype` is that of the weights; with float16, `wo` weights may be float32 (see `read_t5`).
    `packed` are the quantised weights of linear layers; `state_dict` has no entry for them.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: T5Config
    dtype: torch.dtype
    spiece_model: bytes | None = None
    tokenizer_json: Path | None = None
    packed: dict[str, StoredWeight] = field(default_factory=dict)

    def tokenizer(self) -> CaptionTokenizer:
        """The tokenizer that came with the weights; CheckpointError where none did."""
        if self.spiece_model is not None:
            return CaptionTokenizer.from_spiece(
                self.spiece_model,
                embedding_rows=self.config.vocab_size,
                source=f"{self.path}'s tokenizer",
            )
        if self.tokenizer_json is not None:
            return CaptionTokenizer.from_json(self.tokenizer_json)
        raise CheckpointError(
            f"{self.path} brings no tokenizer. There are three ways to give one: pass "
            f"tokenizer=<path of T5's {SPIECE_NAMES[0]} or {JSON_NAME}, or a folder with one>; put "
            f"that file beside the weights; or use weights that carry it as their {SPIECE_KEY!r} "
            "tensor"
        )


def read_t5(path: str | Path, dtype: torch.dtype | None = None) -> T5File:
    """Read a T5 encoder from a file, a Hugging Face folder or a diffusers pipeline folder.

    All weights become `dtype`, one tensor at a time; by default that of the first query weight,
    and bfloat16, which holds every float8 number and the range of the scales, for float8 and
    quantised files. The matrices of the latter stay as they are stored.
    Weights that have it already stay mapped to the file. With float16, `wo` weights that are not
    stored in float16 become float32: their products pass float16's largest number in T5 XXL, so
    they are computed in float32, and should not be rounded on the way.

    Raises CheckpointError for unreadable files, other models (umT5, mT5 and CLIP are named),
    missing or misshapen weights, and weights that are not finite.
    """
    opened = open_t5(path)
    dtype = dtype or opened.dtype
    packed = opened.sound_packed()
    weights = {name: packed.pop(name).dense(dtype) for name in opened.tables() if name in packed}
    weights |= {name: opened.plain(name, wo_dtype(name, tensor, dtype))
                for name, tensor in opened.weights.items()}
    for name in opened.tables():
        opened.require_finite(name, weights[name])
    return opened.as_file(weights, packed, dtype)


def inspect_t5(path: str | Path) -> T5Config:
    """The sizes of a T5 encoder from names and shapes alone: no weight is read.

    Raises CheckpointError as `read_t5` does, but for weights that are not finite.
    """
    return open_t5(path).config


@dataclass(frozen=True)
class OpenedT5:
    """A T5 encoder as its file stores it, sizes and names checked, no weight read yet.

    `scales` are those of plain float8 weights; `mapped` says that every tensor is backed by the
    file. Every name is in `weights` or in `packed`.
    """

    path: Path
    weights: dict[str, Tensor]
    packed: dict[str, StoredWeight]
    scales: dict[str, Tensor]
    config: T5Config
    spiece_model: bytes | None
    tokenizer_json: Path | None
    mapped: bool

    @property
    def dtype(self) -> torch.dtype:
        """That of the first query weight; bfloat16 for float8 and quantised files."""
        first = self.weights.get(_FIRST_QUERY)
        eight_bits = first is None or first.dtype in FP8_DTYPES
        return torch.bfloat16 if eight_bits else first.dtype

    def tables(self) -> tuple[str, ...]:
        """The matrices that are looked up, and belong to no linear layer."""
        return EMBEDDING, _BIAS.format(0)

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in `dtype`; CheckpointError unless it is finite."""
        tensor = plain_weight(name, self.weights[name], self.scales.get(name), dtype)
        self.require_finite(name, tensor)
        return tensor

    def require_finite(self, name: str, tensor: Tensor) -> None:
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CheckpointError(f"{self.path}: {name} holds numbers that are not finite (NaN or "
                                  f"infinite) in {tensor.dtype}; the file is damaged or made for "
                                  "another dtype")

    def sound_packed(self) -> dict[str, StoredWeight]:
        """The quantised weights; CheckpointError for scales that are not finite."""
        for name, one in self.packed.items():
            if not one.is_finite():
                raise CheckpointError(f"{self.path}: {name} ({one.packing}) has scales that are "
                                      "not finite (NaN or infinite); the file is damaged")
        return dict(self.packed)

    def as_file(self, weights: dict[str, Tensor], packed: dict[str, StoredWeight],
                dtype: torch.dtype) -> T5File:
        """The file with these weights in place of its own."""
        return T5File(self.path, weights, self.config, dtype, self.spiece_model,
                      self.tokenizer_json, packed)


def open_t5(path: str | Path) -> OpenedT5:
    """Open a T5 encoder; raises CheckpointError as `inspect_t5` does."""
    path = Path(path)
    checkpoint = read_checkpoint(path, subfolder="text_encoder", keep_packed=True)
    everything = {**checkpoint.state_dict, **checkpoint.packed}
    found, scales = split_side_tensors(_encoder_tensors(everything, path))
    config = _read_config(found, checkpoint.config, path)
    _check_shapes(found, config, path)
    packed = {name: t for name, t in found.items() if isinstance(t, StoredWeight)}
    weights = {name: t for name, t in found.items() if name not in packed}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, a quantisation that is not "
                                  "supported; use a 16-bit or float8 file, or make one with: "
                                  "pixart quantize")
    return OpenedT5(path, weights, packed, scales, config,
                    *_find_tokenizer(checkpoint.state_dict, path), checkpoint.mapped)


def wo_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a weight becomes where the encoder computes in `dtype`, see `read_t5`."""
    wide = is_wo(name) and dtype is torch.float16 and tensor.dtype is not torch.float16
    return torch.float32 if wide else dtype


def _encoder_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What belongs to the encoder, without what ComfyUI and bundles put in front of its names."""
    prefixes = sorted({m["prefix"] for name in tensors if (m := _FIRST_BLOCK.fullmatch(name))})
    if not prefixes:
        if any("decoder.block.0." in name for name in tensors):
            raise CheckpointError(f"{path} holds the decoder of a T5 without its encoder; "
                                  f"{_EXPECTED}")
        raise CheckpointError(f"{path} {explain(tensors)}. {_EXPECTED}, whose tensors are called "
                              f"{_FIRST_QUERY} and so on")
    if len(prefixes) > 1:
        raise CheckpointError(f"{path} holds several T5 encoders (under {', '.join(prefixes)}); "
                              "give a file with one")
    encoder: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else ""
        if name.startswith(_EMBEDDING_COPY):
            copies["shared." + name.removeprefix(_EMBEDDING_COPY)] = tensor
        elif name.startswith(("shared.", "encoder.")):
            encoder[name] = tensor
    if EMBEDDING not in encoder:
        encoder |= copies
    if EMBEDDING not in encoder:
        raise CheckpointError(f"{path} lacks {prefixes[0]}{EMBEDDING}, the token embedding")
    return encoder


def _read_config(weights: Mapping[str, Tensor], said: Mapping[str, Any], path: Path) -> T5Config:
    """Sizes from the shapes; from config.json only what no shape tells."""
    vocab_size, d_model = _shape(weights, EMBEDDING, path)
    if vocab_size in _FOREIGN_VOCABULARIES or _BIAS.format(1) in weights:
        name = _FOREIGN_VOCABULARIES.get(vocab_size, "umT5")
        why = ("its vocabulary" if vocab_size in _FOREIGN_VOCABULARIES
               else "every block has its own relative_attention_bias")
        raise CheckpointError(f"{path} is a {name} text encoder ({why}; {vocab_size} tokens); "
                              f"{_EXPECTED}")
    buckets, heads = _shape(weights, _BIAS.format(0), path)
    inner, _ = _shape(weights, _FIRST_QUERY, path)
    if inner % heads:
        raise CheckpointError(f"{path}: {inner} query rows cannot be split into {heads} heads")
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in weights
    wi = "wi_0" if gated else "wi"
    d_ff, _ = _shape(weights, f"encoder.block.0.layer.1.DenseReluDense.{wi}.weight", path)
    layers = len({m[1] for name in weights if (m := _BLOCK.match(name))})
    config = T5Config(d_model, inner // heads, d_ff, layers, heads, vocab_size, buckets,
                      gated=gated, activation="gelu_new" if gated else "relu")
    if said and said.get("d_model") != d_model:
        logger.debug("%s: the config.json beside it is not a T5's of this size", path)
        return config
    return _with_unseen_fields(config, said, path)


def _with_unseen_fields(config: T5Config, said: Mapping[str, Any], path: Path) -> T5Config:
    fields: dict[str, Any] = {}
    for name, kind in (("relative_attention_max_distance", int), ("layer_norm_epsilon", float)):
        if name in said:
            value = said[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise CheckpointError(f"{path}: config.json gives {name} as {value!r}; a positive "
                                      "number was expected")
            fields[name] = kind(value)
    projection = said.get("feed_forward_proj")
    if isinstance(projection, str):
        activation = projection.rpartition("-")[2]
        # transformers' own reading of this word: the tanh form of GELU
        fields["activation"] = "gelu_new" if projection == "gated-gelu" else activation
    return replace(config, **fields)


def _check_shapes(weights: Mapping[str, Tensor], config: T5Config, path: Path) -> None:
    """Every weight is there in its shape, and no other; CheckpointError names the first fault."""
    shapes = expected_shapes(config)
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]} ({len(missing)} such weights) of a T5 "
                              f"encoder with {config.num_layers} blocks; the file is incomplete")
    unknown = [name for name in weights if name not in shapes]
    if unknown:
        raise CheckpointError(f"{path} has {unknown[0]} ({len(unknown)} such tensors), which a T5 "
                              f"encoder does not have; {_EXPECTED}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(weights[name].shape)}, "
                                  f"{shape} was expected")


def is_wo(name: str) -> bool:
    """Whether a weight is the last matrix of a feed-forward layer, which needs float32's range."""
    return name.endswith(".wo.weight")


def expected_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Every weight of a T5 encoder of this size, under Hugging Face's names."""
    wide, inner = config.d_model, config.num_heads * config.d_kv
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, wide),
        _BIAS.format(0): (config.relative_attention_num_buckets, config.num_heads),
        "encoder.final_layer_norm.weight": (wide,),
    }
    for i in range(config.num_layers):
        attention, feed = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        shapes |= {f"{attention}SelfAttention.{name}.weight": (inner, wide) for name in "qkv"}
        shapes[f"{attention}SelfAttention.o.weight"] = (wide, inner)
        shapes |= {f"{part}layer_norm.weight": (wide,) for part in (attention, feed)}
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            shapes[f"{feed}DenseReluDense.{name}.weight"] = (config.d_ff, wide)
        shapes[f"{feed}DenseReluDense.wo.weight"] = (wide, config.d_ff)
    return shapes


def _shape(weights: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    if name not in weights:
        raise CheckpointError(f"{path} lacks {name}; the T5 encoder in it is incomplete")
    if len(weights[name].shape) != 2 or 0 in weights[name].shape:
        raise CheckpointError(f"{path}: {name} has shape {tuple(weights[name].shape)}; a matrix "
                              "was expected")
    rows, columns = weights[name].shape
    return rows, columns


def _find_tokenizer(tensors: Mapping[str, Tensor], path: Path) -> tuple[bytes | None, Path | None]:
    """The SentencePiece model, inside the file or beside it, and the tokenizer.json beside it."""
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == SPIECE_KEY and tensor.dtype == torch.uint8:
            return tensor.contiguous().numpy().tobytes(), None
    home = path if path.is_dir() else path.parent
    folders = [home, home / "tokenizer"]
    if home.name == "text_encoder":
        folders.append(home.parent / "tokenizer")
    spiece = [f / name for f in folders for name in SPIECE_NAMES if (f / name).is_file()]
    jsons = [f / JSON_NAME for f in folders if (f / JSON_NAME).is_file()]
    return spiece[0].read_bytes() if spiece else None, jsons[0] if jsons else None
