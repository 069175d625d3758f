"""Which files of a diffusers or Hugging Face folder hold the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .header import CheckpointError

# tried in this order; the names diffusers, transformers and peft write
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model",
          "pytorch_lora_weights")
_SUFFIXES = (".safetensors", ".bin")
_VARIANTS = ("", ".fp16", ".bf16")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.[a-z]+)")


def find_files(folder: Path, subfolder: str | None) -> tuple[Path, list[Path], Path | None]:
    """The folder entered, its single weight file, and the shard index if it is sharded instead.

    Raises CheckpointError when nothing, or more than one thing, could be meant.
    """
    places = [folder]
    if subfolder is not None:
        if not re.fullmatch(r"[\w.-]+", subfolder) or subfolder in (".", ".."):
            raise CheckpointError(f"subfolder is {subfolder!r}; a plain folder name was expected")
        inner = folder / subfolder
        if (folder / "model_index.json").is_file() or inner.is_dir():
            if not inner.is_dir():
                raise CheckpointError(f"{folder} is a diffusers pipeline without a {subfolder!r} "
                                      "folder")
            places = [inner]
    else:
        places.append(folder / "transformer")
    for place in places:
        found = _weights_of(place) if place.is_dir() else None
        if found is not None:
            return (place, *found)
    raise CheckpointError(
        f"{' and '.join(str(p) for p in places)} hold no weights; looked for "
        f"{_STEMS[0]}.safetensors, {_STEMS[1]}.safetensors, {_STEMS[2]}.bin, their shard indices, "
        "or a single .safetensors file"
    )


def _weights_of(folder: Path) -> tuple[list[Path], Path | None] | None:
    for suffix in _SUFFIXES:
        for stem in _STEMS:
            for variant in _VARIANTS:
                single = folder / f"{stem}{variant}{suffix}"
                if single.is_file():
                    return [single], None
                for index in (folder / f"{stem}{suffix}.index{variant}.json",
                              folder / f"{stem}{variant}{suffix}.index.json"):
                    if index.is_file():
                        return [], index
    others = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".safetensors", ".sft"))
    if len(others) > 1:
        names = ", ".join(p.name for p in others[:5])
        raise CheckpointError(f"{folder} holds several weight files ({names}); choose one of them")
    return ([others[0]], neighbour_index(others[0])) if others else None


def neighbour_index(path: Path) -> Path | None:
    """The index of the set that a shard belongs to; None for a file that is not a shard."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return None
    stem, suffix = match["stem"], match["suffix"]
    names = [f"{stem}{suffix}.index.json"]
    base, _, variant = stem.rpartition(".")
    if base:
        names.append(f"{base}{suffix}.index.{variant}.json")
    for name in names:
        index = path.with_name(name)
        if index.is_file() and path.name in read_index(index).values():
            return index
    raise CheckpointError(f"{path.name} is one shard of several, but its index {names[0]} is not "
                          f"in {path.parent}; put the index and all shards into one folder")


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name; refuses shard names that leave the index's folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; it is not a shard index")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard or shard in (".", "..") \
                or any(c in shard for c in '/\\:\0'):
            raise CheckpointError(f"{index} names the shard {shard!r}; only files in its own "
                                  "folder are read")
    return weight_map


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError when it holds anything else."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; an object was "
                              "expected")
    return content
