"""Reading weight files: one door for every container, and one error for everything that is wrong.

Tensors stay mapped to the file where the format allows it, so reading costs no memory until a
tensor is used. Pickles are only ever opened with `weights_only=True`.
"""

from __future__ import annotations

import logging
import pickle
import re
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.formats import split_stored, unpacked
from ..quant.stored import StoredWeight
from .config_tensor import with_config_tensor
from .folder import find_files, neighbour_index, read_index, read_json_object
from .gguf import read_gguf
from .header import CheckpointError, check_header, describe_bytes

__all__ = ["Checkpoint", "CheckpointError", "holds_program", "read_checkpoint",
           "unwrap_state_dict"]

logger = logging.getLogger(__name__)

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
GGUF_SUFFIX = ".gguf"

_REFUSED = re.compile(r"unsupported (global|class)[^\n]{0,120}", re.IGNORECASE)
_WRAPPERS = ("model", "module")
_PARALLEL_PREFIXES = ("module.", "_orig_mod.")


@dataclass
class Checkpoint:
    """Tensors of one model and what the files around them say about it.

    `metadata` is the safetensors header's `__metadata__`, `config` the config.json beside the file
    (both {} where there is none) and `pipeline_class` the `_class_name` of the diffusers pipeline
    the folder belongs to. `mapped` says that every tensor is backed by its file, not by memory.
    `packed` are the quantised weights, see `read_checkpoint`.
    """

    path: Path
    state_dict: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    pipeline_class: str | None = None
    mapped: bool = False
    packed: dict[str, StoredWeight] = field(default_factory=dict)


def read_checkpoint(
    path: str | Path, subfolder: str | None = None, *, prefer_ema: bool = False,
    keep_packed: bool = False,
) -> Checkpoint:
    """Read a weight file, one shard of a set, or a diffusers / Hugging Face folder.

    `subfolder` is the part of a whole pipeline to enter ("transformer", "text_encoder", "vae"); it
    matters for folders only. Without it the folder itself is tried, then its "transformer".
    `prefer_ema` takes `state_dict_ema` of a training file instead of `state_dict`; whichever exists
    is taken when there is only one. Quantised weights (of GGUF files, or with `comfy_quant` beside
    them) become float32; with `keep_packed` those of linear layers stay as they are in `packed`,
    and `state_dict` has placeholders (on the meta device) in their place.

    Raises CheckpointError, a ValueError, for everything that can be wrong with a file, and
    ImportError for GGUF files where the gguf package is missing.
    """
    path = Path(path)
    try:
        return _read(path, subfolder, prefer_ema, keep_packed)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read(path: Path, subfolder: str | None, prefer_ema: bool, keep_packed: bool) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    folder = path
    if path.is_dir():
        folder, files, index = find_files(path, subfolder)
    else:
        folder, files, index = path.parent, [path], neighbour_index(path)
    config_file, pipeline_file = folder / "config.json", folder.parent / "model_index.json"
    config = read_json_object(config_file) if config_file.is_file() else {}
    pipeline = read_json_object(pipeline_file) if pipeline_file.is_file() else {}

    if path.suffix.lower() == GGUF_SUFFIX and not path.is_dir():
        read = read_gguf(path, keep_packed=keep_packed)
        return Checkpoint(path, read.state_dict, read.metadata, read.config or config,
                          packed=read.packed)
    found = _read_shards(index, prefer_ema) if index else _read_file(files[0], prefer_ema)
    state_dict = _strip_parallel(found.state_dict)
    if not state_dict:
        raise CheckpointError(f"{path} holds no tensors")
    try:
        state_dict, stored = split_stored(state_dict)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    state_dict |= {name: weight.placeholder() for name, weight in stored.items()} \
        if keep_packed else unpacked(stored, state_dict)
    metadata = with_config_tensor(state_dict, found.metadata, str(path))
    name = pipeline.get("_class_name")
    pipeline_class = name if isinstance(name, str) else None
    return Checkpoint(path, state_dict, metadata, config, pipeline_class, found.mapped,
                      stored if keep_packed else {})


def _read_shards(index: Path, prefer_ema: bool) -> Checkpoint:
    weight_map = read_index(index)
    whole = Checkpoint(index, {}, mapped=True)
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{index} needs the shard {shard}, which is not in its folder; "
                                  "download the missing file")
        part = _read_file(file, prefer_ema)
        tensors = part.state_dict
        missing = [k for k, where in weight_map.items() if where == shard and k not in tensors]
        if missing:
            raise CheckpointError(f"{index.name} says that {shard} holds {missing[0]!r} "
                                  f"({len(missing)} such names), but it does not; the index and "
                                  "the shards are not of one set")
        whole.state_dict.update((k, v) for k, v in tensors.items()
                                if weight_map.get(k, shard) == shard)
        whole.metadata.update(part.metadata)
        whole.mapped &= part.mapped
    return whole


def _read_file(path: Path, prefer_ema: bool) -> Checkpoint:
    suffix = path.suffix.lower()
    if suffix not in SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES:
        known = ", ".join((*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES, GGUF_SUFFIX))
        raise CheckpointError(f"{path.name} is a {suffix or 'suffixless'} file, which is not "
                              f"supported; the formats that are: {known} and diffusers folders")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    foreign = describe_bytes(head)
    if suffix in SAFETENSORS_SUFFIXES:
        if foreign:
            raise CheckpointError(f"{path} is not a safetensors file: it is {foreign}")
        return _read_safetensors(path)
    loaded = _read_pickle(path, head, foreign)
    state_dict = unwrap_state_dict(loaded, str(path), prefer_ema)
    return Checkpoint(path, state_dict, mapped=_is_zip(head))


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import safe_open

    check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(path, tensors, dict(file.metadata() or {}), mapped=True)
    except Exception as error:  # the parser names no closed set of errors
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error


def _read_pickle(path: Path, head: bytes, foreign: str | None) -> Any:
    is_zip = _is_zip(head)
    if not is_zip and (not head.startswith(b"\x80") or tarfile.is_tarfile(path)):
        # tar archives are refused because weights_only did not guard them before torch 2.6
        raise CheckpointError(f"{path} is not a PyTorch file: it is {foreign or 'something else'}")
    if is_zip:
        _refuse_program(path)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # damaged pickles fail with anything
        found = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found is None:
            raise CheckpointError(f"{path} is cut short or damaged: {_gist(error)}") from error
        raise CheckpointError(
            f"{path} holds Python objects besides tensors ({found[0]}) and could run code when "
            "opened, so it was not opened (weights_only=True). If you trust its source, convert it "
            "once: load it with torch.load(path, weights_only=False) and save its state_dict with "
            "safetensors.torch.save_file"
        ) from error


def holds_program(path: Path) -> bool:
    """Whether a zip archive is TorchScript, which looks like weights; torch.load would load it.

    Raises whatever zipfile does for a damaged archive.
    """
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _refuse_program(path: Path) -> None:
    try:
        is_program = holds_program(path)
    except Exception as error:  # zipfile raises more than BadZipFile for damaged directories
        raise CheckpointError(f"{path} is cut short or damaged ({error}); download it "
                              "again") from error
    if is_program:
        raise CheckpointError(f"{path} is a TorchScript program, not a dictionary of tensors")


def _is_zip(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def _gist(error: Exception) -> str:
    """The one line of an error that says what went wrong; PyTorch wraps it in advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no details"]
    line = next((li for li in lines if "WeightsUnpickler error" in li), lines[0])
    return f"{type(error).__name__}: {line[:200]}"


def unwrap_state_dict(loaded: Any, source: str, prefer_ema: bool = False) -> dict[str, Tensor]:
    """The named tensors of what torch.load gave, out of whatever training wrapped around them.

    `source` names the file in messages. Raises CheckpointError for anything but a dictionary.
    """
    wrappers = ("state_dict", "state_dict_ema")
    wrappers = (wrappers[::-1] if prefer_ema else wrappers) + _WRAPPERS
    content = loaded
    for _ in range(4):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{source} holds a {type(content).__name__}; a dictionary of "
                                  "tensors was expected")
        inner = next((content[w] for w in wrappers if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    dropped = [str(k) for k in content if k not in tensors]
    if dropped:
        logger.debug("%s: entries that are not tensors are left out: %s", source, dropped)
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{source}: tensor {name!r} is not a plain dense tensor")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _strip_parallel(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel and torch.compile put in front of every one of them."""
    for prefix in _PARALLEL_PREFIXES:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name[len(prefix):]: t for name, t in state_dict.items()}
    return state_dict
