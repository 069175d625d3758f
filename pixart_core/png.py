"""PNG files that carry what made them, so that the same picture can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import require
from .whole import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = "pixart"


def write_png(path: str | Path, image: Image, settings: dict[str, Any]) -> None:
    """Write `image` with `settings` as JSON in the text chunk "pixart", whole or not at all.

    Raises ValueError for a name that does not end in .png or settings that are not JSON, OSError
    when the folder cannot be written.
    """
    path = check_png_path(path)
    require("PIL", "writing pictures")
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    try:
        chunks.add_text(CHUNK, json.dumps(settings, allow_nan=False))  # plain ASCII
    except TypeError as error:
        raise ValueError(f"settings cannot be kept as JSON: {error}") from error
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def check_png_path(path: str | Path) -> Path:
    """`path`, when a PNG can be written there; ValueError for another suffix or no such folder."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path.name} does not end in .png; pictures are written as PNG")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `write_png` put into a picture.

    Raises ValueError when the file is not a PNG or carries none.
    """
    require("PIL", "reading pictures")
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            text = image.text.get(CHUNK)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name} is not a sound PNG file: {error}") from error
    if text is None:
        raise ValueError(f"{path.name} carries no settings of this program; it was made with "
                         "another one, or something removed its text chunks")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the settings in {path.name} are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the settings in {path.name} are a {type(settings).__name__}, an object "
                         "was expected")
    return settings
