"""Writing a T5 encoder to a GGUF file as llama.cpp names it, with its tokenizer inside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.gguf_t5 import SPIECE_FIELD, T5_ARCHITECTURES, llama_names
from ..checkpoint.gguf_write import check_target, write_file
from ..checkpoint.header import CheckpointError
from ..checkpoint.spiece import SentencePieces, read_spiece
from ..quant.blocks import PACKINGS
from ..quant.packed import PackedTensor
from .t5_file import T5Config, T5File
from .tokenizer import EXTRA_IDS

ARCHITECTURE = T5_ARCHITECTURES[1]
TOKEN_EMBEDDING = "token_embd.weight"

_CONTEXT = 512  # what T5 was trained on; its relative positions have no end
_FLOAT16_MAX = 65504
_USER_DEFINED, _UNUSED = 4, 5
_SENTINEL_SCORE, _PADDING_SCORE = -1000.0, -10000.0


def t5_storage_type(name: str, tensor: Tensor | PackedTensor, quant: str) -> str:
    """How a weight of a T5 encoder (llama.cpp's name) is stored: GGML's name of the type.

    Matrices are quantised. Norms and the relative position bias are float32. The token embedding,
    which all else starts from, has 16 bits: those of the file, float16 where it has more.
    """
    if len(tensor.shape) != 2 or ".attn_rel_b." in name:
        return "F32"
    if name == TOKEN_EMBEDDING:
        kept = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype)
        return kept or ("BF16" if quant == "BF16" or tensor.abs().max() > _FLOAT16_MAX else "F16")
    if quant in PACKINGS and tensor.shape[1] % PACKINGS[quant].size:
        return "F16"
    return quant


def write_t5_gguf(path: str | Path, file: T5File, quant: str = "Q8_0") -> Counter[str]:
    """Write a T5 encoder, replacing a file that is there; how many tensors are stored how.

    The file appears under its name only when it is complete. `quant` is one of
    `checkpoint.gguf_write.QUANTS`. The SentencePiece model of `file` goes inside: a unigram
    model, T5's own kind, as llama.cpp has it, another one whole, for this program alone. Without
    one the file has no tokenizer.

    Raises ValueError for another quant or suffix, CheckpointError for an encoder or tokenizer that
    GGUF has no words for and when the file cannot be written, ImportError where the gguf package is
    missing.
    """
    check_target(path, quant)
    _require_known(file)
    tensors = llama_names({**file.state_dict, **file.packed})
    pieces = None if file.spiece_model is None else read_spiece(
        file.spiece_model, f"{file.path.name}'s tokenizer", file.config.vocab_size)
    kinds = {name: t5_storage_type(name, tensor, quant) for name, tensor in tensors.items()}

    def describe(writer: Any) -> None:
        _add_sizes(writer, file.config)
        if pieces is not None and not pieces.like_t5:
            writer.add_array(SPIECE_FIELD, file.spiece_model)
        elif pieces is not None:
            _add_tokenizer(writer, pieces, file.config.vocab_size)

    write_file(path, ARCHITECTURE, tensors, kinds, quant, describe)
    return Counter(kinds.values())


def _require_known(file: T5File) -> None:
    """CheckpointError for what the format has no entry for, and readers would take as T5's own."""
    config, usual = file.config, T5Config(0, 0, 0, 0, 0, 0)
    expected = {"relative_attention_max_distance": usual.relative_attention_max_distance,
                "activation": usual.activation if config.gated else "relu"}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise CheckpointError(f"{file.path.name} has {name} {getattr(config, name)!r}, which a "
                                  f"GGUF file cannot say (it stands for {value!r})")


def _add_sizes(writer: Any, config: T5Config) -> None:
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)


def _add_tokenizer(writer: Any, pieces: SentencePieces, rows: int) -> None:
    """The pieces, behind them T5's sentinels where the table has room, and padding to its end."""
    tokens, scores, types = list(pieces.tokens), list(pieces.scores), list(pieces.types)
    room = rows - len(tokens)
    extra = EXTRA_IDS if room >= EXTRA_IDS else 0
    tokens += [f"<extra_id_{i}>" for i in reversed(range(extra))]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), rows)]
    scores += [_SENTINEL_SCORE] * extra + [_PADDING_SCORE] * (room - extra)
    types += [_USER_DEFINED] * extra + [_UNUSED] * (room - extra)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(pieces.add_space_prefix)
    writer.add_remove_extra_whitespaces(pieces.remove_extra_whitespaces)
    if pieces.charsmap:
        writer.add_precompiled_charsmap(pieces.charsmap)
    writer.add_unk_token_id(pieces.unknown_id)
    writer.add_eos_token_id(pieces.end_id)
    writer.add_pad_token_id(pieces.padding_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
