"""Where models are: the host's folder keys, model folders beside single files, the starter."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

import folder_paths

from ...pixart_core.checkpoint import CheckpointError
from ...pixart_core.checkpoint.folder import find_files, read_index
from ...pixart_core.starter import find_starter
from .gguf import gguf_names

GGUF_KEYS = ("diffusion_models", "text_encoders")


def register_starter() -> None:
    """Show the starter family in the host's lists, as long as its folder is there."""
    starter = find_starter()
    if starter is None:
        return
    for key, file in (("diffusion_models", starter.transformer),
                      ("text_encoders", starter.t5_file), ("vae", starter.vae),
                      ("controlnet", starter.controlnet)):
        folder_paths.add_model_folder_path(key, str(file.parent))


def choices(key: str) -> list[str]:
    """Names under a folder key: files as the host lists them and GGUF files, then model folders.

    The files of such a folder are left out: the folder stands for them.
    """
    folders = _model_folders(key)
    parts = {part for names in folders.values() for part in names}
    files = [name for name in folder_paths.get_filename_list(key)
             if Path(name).as_posix() not in parts]
    if key in GGUF_KEYS:
        files = sorted({*files, *gguf_names(key)})
    return [*files, *sorted(folders)]


def full_path(key: str, name: str) -> str:
    """The path of a name from `choices`. Raises ValueError when it is not there (any more)."""
    if name.endswith("/"):
        path = _folder_path(key, PurePath(name))
    else:
        path = folder_paths.get_full_path(key, name)
    if path is None:
        raise ValueError(f"{name} is not in the {key} folders "
                         f"({', '.join(folder_paths.get_folder_paths(key))}); "
                         "press R to refresh the list, or put the file there")
    return path


def fingerprint(path: str) -> str:
    """Changes when the file, or a file of the folder, does."""
    paths = sorted(Path(path).glob("*")) if os.path.isdir(path) else [Path(path)]
    return "|".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in paths)


def _folder_path(key: str, name: PurePath) -> str | None:
    """The first folder of that name; None for a name that leads out of the model folders."""
    if name.anchor or ".." in name.parts:
        return None
    candidates = (Path(root, name) for root in folder_paths.get_folder_paths(key))
    return next((str(path) for path in candidates if path.is_dir()), None)


def _model_folders(key: str) -> dict[str, list[str]]:
    """Folders with a config beside one model, ending in a slash: {name: its weight files}."""
    config_name = "adapter_config.json" if key == "loras" else "config.json"
    found: dict[str, list[str]] = {}
    for root in map(Path, folder_paths.get_folder_paths(key)):
        for config in (*root.glob(f"*/{config_name}"), *root.glob(f"*/*/{config_name}")):
            parts = [path.relative_to(root).as_posix() for path in _weight_files(config.parent)]
            if parts:
                found.setdefault(config.parent.relative_to(root).as_posix() + "/", parts)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files of the model that a folder is; none where no single model can be meant."""
    try:
        inner, files, index = find_files(folder, None)
        shards = read_index(index).values() if index is not None else ()
    except (CheckpointError, OSError):
        return []
    return [*files, *(inner / shard for shard in set(shards))]
