"""Captions of a folder of images: `.txt` files beside them, or tables (jsonl, parquet)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...extras import require
from .problems import Problems

TABLE_NAMES = ("captions.jsonl", "metadata.jsonl")
TABLE_SUFFIX = ".parquet"
_FILE_COLUMNS = ("file_name", "image", "path")
_TEXT_COLUMNS = ("text", "caption", "prompt")
_CONTROL_COLUMN = "control"
_BATCH = 4096


@dataclass(frozen=True)
class TableRow:
    """A line of a table: the image it names, its captions, maybe a control image."""

    file: Path
    captions: tuple[str, ...]
    control: Path | None
    where: str


def is_table(name: str) -> bool:
    """Whether a file of this name is read as a table of captions."""
    return name in TABLE_NAMES or name.endswith(TABLE_SUFFIX)


def read_table(path: Path, problems: Problems) -> Iterator[TableRow]:
    """The rows of a table; its file names are relative to the table's own folder.

    The image stands in a column `file_name` (or `image`, `path`), captions in `text` (or
    `caption`, `prompt`) as a string or a list of strings, a control image in `control`. Lines that
    say something else go to `problems`. Raises ImportError for a parquet file without pyarrow.
    """
    entries = _parquet(path, problems) if path.suffix == TABLE_SUFFIX else _jsonl(path, problems)
    for where, entry in entries:
        try:
            yield _row(path, where, entry)
        except ValueError as error:
            problems.add(f"{where}: {error}")


def read_text(path: Path) -> tuple[str, ...]:
    """The captions of a `.txt` file, one in each line that is not empty.

    Raises ValueError for a file that is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})"
                         ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return _captions(text.splitlines())


def _row(path: Path, where: str, entry: Any) -> TableRow:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{type(entry).__name__} found, an object with file_name and text was "
                         "expected")
    file = _first(entry, _FILE_COLUMNS)
    if not isinstance(file, str) or not file:
        raise ValueError(f"no image is named; one of {', '.join(_FILE_COLUMNS)} was expected")
    text = _first(entry, _TEXT_COLUMNS)
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(part, str) for part in texts):
        raise ValueError(f"{file} has no caption; one of {', '.join(_TEXT_COLUMNS)} with a string "
                         "or a list of strings was expected")
    control = entry.get(_CONTROL_COLUMN)
    if control is not None and not isinstance(control, str):
        raise ValueError(f"{_CONTROL_COLUMN} of {file} is a {type(control).__name__}; the path of "
                         "an image was expected")
    return TableRow(path.parent / file, _captions(texts),
                    path.parent / control if control else None, where)


def _first(entry: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these columns that says anything; NaN is how pandas writes nothing."""
    found = (entry.get(name) for name in names)
    return next((v for v in found
                 if v is not None and not (isinstance(v, float) and math.isnan(v))), None)


def _captions(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _jsonl(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    problems.add(f"{where} is not JSON: {error}")
    except OSError as error:
        problems.add(f"{path} cannot be read: {error.strerror or error}")


def _parquet(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    parquet = require("pyarrow.parquet", f"reading {path.name}", extra="train")
    import pyarrow

    columns = (*_FILE_COLUMNS, *_TEXT_COLUMNS, _CONTROL_COLUMN)
    try:
        with parquet.ParquetFile(path) as table:
            wanted = [name for name in columns if name in table.schema_arrow.names]
            number = 0
            for batch in table.iter_batches(_BATCH, columns=wanted):
                for entry in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", entry
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(f"{path} cannot be read as parquet: {' '.join(str(error).split())}")
