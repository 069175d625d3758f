"""Encoded prompts on disk, so that a repeated prompt needs no T5.

An entry is a file of `save_embeddings` under the hash of everything that made it: the bytes of the
encoder, its precision, the text or its tokens, and every setting. The prompt itself is not in it,
but its states are, which tell much of it: the folder is for its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.folder import find_files, neighbour_index, read_index
from ..checkpoint.read import CheckpointError
from ..checkpoint.write import sha256_file
from ..whole import whole_file
from .embeddings import CaptionEntry, load_embeddings, save_embeddings

logger = logging.getLogger(__name__)

LIMIT_GB = 1.0
FOLDER_VARIABLE, LIMIT_VARIABLE = "PIXART_TEXT_CACHE", "PIXART_TEXT_CACHE_GB"

_FORMAT = 1
_SUFFIX, _CONFIG = ".safetensors", "config.json"
_HASHES = "encoders"  # a folder of the cache: {path, size, time -> hash} of every encoder
_LEFT_OVER = 3600  # seconds after which an unfinished file has no writer any more


class TextCache:
    """Encoded prompts in `folder`, at most `limit` bytes: those unused for longest leave first.

    Several processes may share a folder: entries appear whole, and one that is gone is a miss.
    """

    def __init__(self, folder: str | Path, limit: int = int(LIMIT_GB * 1e9)) -> None:
        if limit <= 0:
            raise ValueError(f"the text cache has a limit of {limit} bytes; give it some room, or "
                             "no cache")
        self.folder, self.limit = Path(folder), limit

    def get(self, key: str) -> Tensor | None:
        """The states (L, D) or (B, L, D) under `key`, as they were put there, None for a miss.

        A damaged entry is removed, which is logged, and is a miss.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            (entry,), info = load_embeddings(path)
            if info.get("key") != key:
                raise CheckpointError(f"{path.name} holds another entry")
        except ValueError as error:
            if path.is_file():
                logger.warning("an entry of the text cache is damaged, the prompt is encoded "
                               "again: %s", error)
                _delete(path)
            return None
        try:
            os.utime(path)
        except OSError:
            logger.debug("%s is used and cannot say so", path)
        # a copy: an entry that a prompt is mapped to could not leave the cache everywhere
        return (entry.caption[0] if info["row"] else entry.caption).clone()

    def put(self, key: str, states: Tensor) -> None:
        """Keep states; a folder that cannot be written is logged and leaves them out."""
        row = states.ndim == 2
        whole = states[None] if row else states
        try:
            self._make_folder()
            save_embeddings(self._path(key), [CaptionEntry(whole.detach().cpu())],
                            {"key": key, "row": row})
            self._make_room()
        except (OSError, CheckpointError) as error:
            logger.warning("the text cache does not keep this prompt: %s", error)

    def encoder_hash(self, path: str | Path) -> str:
        """SHA-256 of what a T5 is read from; kept in the folder while sizes and times stay.

        Raises CheckpointError for files that cannot be read.
        """
        files = encoder_files(path)
        seen = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        note = self.folder / _HASHES / f"{_sha256(seen[0][0])}.json"
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["files"] == seen:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        logger.info("text cache: reading %s once, to know it again", Path(path).name)
        digest = _sha256([[f.name == _CONFIG, sha256_file(f)] for f in files])
        try:
            self._make_folder()
            note.parent.mkdir(exist_ok=True)
            with whole_file(note) as temporary:
                temporary.write_text(json.dumps({"files": seen, "sha256": digest}),
                                     encoding="utf-8")
        except OSError as error:
            logger.warning("the text cache cannot note the hash of the encoder: %s", error)
        return digest

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _make_room(self) -> None:
        entries = []
        for file in self.folder.iterdir():
            try:
                found = file.stat()
            except OSError:  # another process removed it
                continue
            if file.suffix == _SUFFIX:
                entries.append((found.st_mtime_ns, found.st_size, file))
            elif file.suffix == ".part" and time.time() - found.st_mtime > _LEFT_OVER:
                _delete(file)
        total = sum(size for _, size, _ in entries)
        for _, size, file in sorted(entries):
            if total <= self.limit:
                break
            if _delete(file):
                total -= size


def _delete(file: Path) -> bool:
    """Whether a file is gone; one that another program has open stays, which is logged."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the text cache cannot delete %s now: %s", file, error)
        return False
    return True


def cache_key(**parts: Any) -> str:
    """The name of an entry: the hash of everything that its states depend on (JSON values)."""
    return _sha256({"format": _FORMAT, **parts})


def encoder_files(path: str | Path) -> list[Path]:
    """The weight files that a T5 is read from, and the config.json beside them.

    Raises CheckpointError where there are none.
    """
    path = Path(path)
    if path.is_dir():
        folder, files, index = find_files(path, "text_encoder")
    elif path.is_file():
        folder, files, index = path.parent, [path], neighbour_index(path)
    else:
        raise CheckpointError(f"{path} does not exist")
    if index is not None:
        files = [index, *(index.parent / name for name in sorted(set(read_index(index).values())))]
    config = folder / _CONFIG
    return [*files, config] if config.is_file() else files


def cache_from_environment(folder: str | Path | None = None) -> TextCache | None:
    """The cache in `folder`, or in that of PIXART_TEXT_CACHE; None where neither is named.

    PIXART_TEXT_CACHE_GB is its limit, 1 unless set. Raises ValueError for what is no number.
    """
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    return TextCache(folder, limit_from_environment()) if folder else None


def limit_from_environment() -> int:
    """Bytes of PIXART_TEXT_CACHE_GB, of 1 GB where it is not set; ValueError for no number."""
    text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise ValueError(f"{LIMIT_VARIABLE} is {text!r}; a number of gigabytes above 0 was "
                         "expected")
    return limit


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
