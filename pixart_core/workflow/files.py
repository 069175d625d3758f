"""Workflow files: JSON as ComfyUI saves it, the chunks of its pictures, and writing it whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..extras import require
from ..whole import whole_file
from .graph import WorkflowError

_PNG = b"\x89PNG\r\n\x1a\n"
CHUNKS = ("workflow", "prompt")
"""What ComfyUI keeps in a picture: the page's workflow, and the API prompt that was run."""


def read_workflow(path: str | Path, chunk: str | None = None) -> Any:
    """The JSON of a workflow file, or of a picture that ComfyUI saved.

    From a picture `chunk` ("workflow" or "prompt") is taken, by default the first of both that is
    there. Raises WorkflowError that says what the file is instead.
    """
    path = Path(path)
    if not path.is_file():
        raise WorkflowError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error}") from error
    if content.startswith(_PNG):
        return _parse(_picture_text(path, chunk), f"the workflow in {path.name}")
    if chunk is not None:
        raise WorkflowError(f"{path.name} is no PNG picture, only those hold a {chunk}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{path.name} is neither JSON nor a PNG picture; save the workflow on "
                            "the web page (Workflow, Export) and upgrade that file") from error
    return _parse(text, path.name)


def write_workflow(path: str | Path, document: Any) -> None:
    """Write `document` as JSON, whole or not at all, through links and with the mode of the file
    that is there. Raises OSError when the folder cannot be written."""
    path = Path(path).resolve()
    try:
        content = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a character pair, which only escapes can hold
        content = json.dumps(document, indent=2).encode() + b"\n"
    mode = path.stat().st_mode if path.exists() else None
    with whole_file(path, mode=mode) as temporary:
        temporary.write_bytes(content)


def _parse(text: str, name: str) -> Any:
    try:
        # ComfyUI writes NaN into pictures, which the web page reads as null
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{name} is not JSON: {error}") from error


def _picture_text(path: Path, chunk: str | None) -> str:
    require("PIL", "reading pictures")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            texts = dict(image.text)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise WorkflowError(f"{path.name} is not a sound PNG file: {error}") from error
    names = CHUNKS if chunk is None else (chunk,)
    for name in names:
        if name in texts:
            return texts[name]
    raise WorkflowError(f"{path.name} carries no {' and no '.join(names)} of ComfyUI; it was made "
                        "with another program, or something removed its text chunks")
