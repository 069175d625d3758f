"""Writing safetensors files whole or not at all, and the fingerprint of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..whole import whole_file
from .header import CheckpointError

_CHUNK = 1 << 22


def write_checkpoint(path: str | Path, state_dict: Mapping[str, Tensor],
                     metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, replacing one that is there.

    The file appears under its name only when it is complete. Non-contiguous tensors and tensors
    that share memory are stored as separate copies; nothing is added to `metadata`.

    Raises CheckpointError when the folder cannot be written, ValueError for a wrong suffix, an
    empty state dict, or metadata that is not text.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(f"{path.name}: weights are written as .safetensors files only")
    if not state_dict:
        raise ValueError(f"{path.name}: there are no tensors to write")
    wrong = [k for k, v in metadata.items() if not (isinstance(k, str) and isinstance(v, str))]
    if wrong:
        raise ValueError(f"metadata entry {wrong[0]!r} is not text; encode it as JSON first")
    try:
        with whole_file(path) as temporary:
            save_file(_separate(state_dict), str(temporary), metadata=dict(metadata) or None)
    except Exception as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


def _separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU no two of which overlap in memory."""
    out = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    end = 0
    for name, tensor in sorted(out.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end and tensor.numel():
            out[name] = tensor.clone()
        end = max(end, start + tensor.numel() * tensor.element_size())
    return out


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; of a folder, over its sorted file names and contents.

    Raises CheckpointError when the path does not exist or cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return _digest(path).hex()
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            whole.update(file.relative_to(path).as_posix().encode() + b"\0" + _digest(file))
        return whole.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
