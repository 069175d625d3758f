"""Writing a PixArt transformer to a GGUF file, in a block format of the caller's choice."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import METADATA_KEY, PixArtConfig
from ..extras import require
from ..quant.blocks import PACKINGS
from .gguf import ARCHITECTURE, SUFFIX
from .header import CheckpointError

# what the gguf package can write, by falling size
QUANTS = ("BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")

_PLAIN = {"F16": torch.float16, "F32": torch.float32}
_SHARED_MODULATION = "t_block.1.weight"


def storage_type(name: str, tensor: Tensor, quant: str) -> str:
    """How a weight of a PixArt transformer (native name) is stored: GGML's name of the type.

    Matrices of the blocks and of the caption projection are quantised. What every token depends on
    or what is small stays as it is: embedders, tables, norms, biases, null caption, final layer. Of
    that, the matrix of the shared modulation is large enough to be stored in 16 bits.
    """
    kept = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
    if tensor.ndim != 2 or not name.endswith(".weight"):
        return kept
    if name == _SHARED_MODULATION:
        half = "BF16" if quant == "BF16" or tensor.abs().max() > 65504 else "F16"
        return half if kept == "F32" else kept
    if not name.startswith(("blocks.", "y_embedder.y_proj.")):
        return kept
    if quant in PACKINGS and tensor.shape[1] % PACKINGS[quant].size:
        return "F16" if kept == "F32" else kept
    return quant


def write_gguf(path: str | Path, state_dict: Mapping[str, Tensor], config: PixArtConfig,
               quant: str = "Q8_0") -> None:
    """Write a transformer under native names, replacing a file that is there.

    The file appears under its name only when it is complete. `quant` is one of QUANTS; what it is
    used for, see `storage_type`. The config goes along as `pixart_config`.

    Raises ValueError for another quant or suffix, CheckpointError when the file cannot be written,
    ImportError where the gguf package is missing.
    """
    path = Path(path)
    if quant not in QUANTS:
        raise ValueError(f"quant is {quant!r}; use one of {', '.join(QUANTS)}")
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"{path.name}: a GGUF file ends in {SUFFIX}")
    gguf = require("gguf", "writing GGUF files", extra="gguf")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _write(gguf, temporary, state_dict, config, quant)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(gguf: Any, path: Path, state_dict: Mapping[str, Tensor], config: PixArtConfig,
           quant: str) -> None:
    kinds = {name: storage_type(name, tensor, quant) for name, tensor in state_dict.items()}
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(METADATA_KEY, config.to_json())
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{quant}"]))
        for name, tensor in state_dict.items():
            raw = gguf.GGMLQuantizationType[kinds[name]]
            size, nbytes = gguf.GGML_QUANT_SIZES[raw]
            writer.add_tensor_info(name, tuple(tensor.shape), None,
                                   tensor.numel() // size * nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in state_dict.items():  # one at a time: no second copy of the model
            writer.write_tensor_data(_encoded(gguf, tensor, kinds[name]))
    finally:
        writer.close()


def _encoded(gguf: Any, tensor: Tensor, kind: str) -> Any:
    """The numpy array whose bytes are stored."""
    tensor = tensor.detach().cpu().contiguous()
    if kind == "BF16":
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if kind in PACKINGS:
        return gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
    return tensor.to(_PLAIN[kind]).numpy()
