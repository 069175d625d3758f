"""CONDITIONING in files: where they are, and what the host's dictionaries are to the engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.cli_args import args

from ...pixart_core.checkpoint.read import SAFETENSORS_SUFFIXES
from ...pixart_core.text.embeddings import CaptionEntry, load_embeddings, save_embeddings
from .conds import caption_mask
from .files import fingerprint

FOLDER = "embeddings"  # a folder key of the host, and where we save below its output folder
_OUTPUT = " [output]"  # as the host marks files of its output folder
_MASK = "attention_mask"
_TEXTS, _ENCODERS = ("text", "prompts"), ("t5_name", "clip_name", "clip_name1")


def choices() -> list[str]:
    """Files in the embeddings folders, then those saved in the output folder."""
    named = [name for name in folder_paths.get_filename_list(FOLDER)
             if name.lower().endswith(SAFETENSORS_SUFFIXES)]
    root = Path(folder_paths.get_output_directory())
    saved = sorted(path.relative_to(root).as_posix() for path in (root / FOLDER).rglob("*")
                   if path.suffix.lower() in SAFETENSORS_SUFFIXES)
    return [*named, *(f"{name}{_OUTPUT}" for name in saved)]


def full_path(name: str) -> str:
    """The path of a name from `choices`. Raises ValueError when it is not there (any more)."""
    path = None
    if not name.endswith(_OUTPUT):
        path = folder_paths.get_full_path(FOLDER, name)
    else:
        part = name.removesuffix(_OUTPUT)
        file = Path(folder_paths.get_output_directory(), part)
        parsed = PureWindowsPath(part)  # which knows slashes, backslashes and drives, anywhere
        if not parsed.anchor and ".." not in parsed.parts and file.is_file():
            path = str(file)
    if path is None:
        raise ValueError(f"{name} is not in the {FOLDER} folders "
                         f"({', '.join(folder_paths.get_folder_paths(FOLDER))}) or the output "
                         "folder; press R to refresh the list, or put the file there")
    return path


def check(path: str) -> None:
    """Raise CheckpointError when `path` holds no encoded prompt."""
    _check_once(path, fingerprint(path))


@functools.lru_cache(maxsize=32)
def _check_once(path: str, _fingerprint: str) -> None:
    load_embeddings(path)


def load(path: str) -> tuple[list, dict[str, Any]]:
    """CONDITIONING of a file, and what the file says about it. Raises CheckpointError."""
    entries, info = load_embeddings(path)
    device = comfy.model_management.intermediate_device()
    conditioning = []
    for entry in entries:
        options = {"pooled_output": None, **entry.options, **entry.tensors}
        if entry.mask is not None:
            options[_MASK] = entry.mask.to(device)
        conditioning.append([entry.caption.to(device), options])
    return conditioning, info


def save(conditioning: list, prefix: str, prompt: Mapping[str, Any] | None, node_id: str | None,
         extra: Mapping[str, Any] | None) -> str:
    """Write CONDITIONING below the output folder; the file's name there, with slashes.

    The workflow goes into the header, as in the host's own files, unless the host was told to
    leave it out. Raises ValueError for conditioning that a file cannot hold.
    """
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory())
    name = f"{name}_{counter:05}_.safetensors"
    metadata, info = {}, {}
    if not args.disable_metadata and prompt is not None:
        info = describe(prompt, node_id)
        metadata = {key: json.dumps(value) for key, value in (extra or {}).items()}
        metadata["prompt"] = json.dumps(prompt)
    save_embeddings(Path(folder, name), [_entry(*pair) for pair in conditioning], info, metadata)
    return (PurePosixPath(Path(subfolder).as_posix()) / name).as_posix()


def _entry(caption: torch.Tensor, options: Mapping[str, Any]) -> CaptionEntry:
    tensors = {k: v for k, v in options.items() if isinstance(v, torch.Tensor) and k != _MASK}
    plain = {k: v for k, v in options.items() if k not in tensors and k != _MASK}
    mask = options.get(_MASK)
    if caption.ndim == 3:
        mask = caption_mask(caption, mask)
    return CaptionEntry(caption, mask, plain, tensors)


def describe(prompt: Mapping[str, Any], node_id: str | None) -> dict[str, str]:
    """The prompts and text encoders that flow into a node of an API prompt, for people."""
    found: dict[str, list[str]] = {"prompt": [], "encoder": []}
    waiting, seen = [node_id], set()
    while waiting:
        node = waiting.pop(0)
        if node in seen or node not in prompt:
            continue
        seen.add(node)
        for name, value in prompt[node].get("inputs", {}).items():
            if isinstance(value, list) and len(value) == 2:
                waiting.append(str(value[0]))
            elif isinstance(value, str) and name in (*_TEXTS, *_ENCODERS):
                found["prompt" if name in _TEXTS else "encoder"].append(value)
    return {kind: "\n".join(values) for kind, values in found.items() if values}
