"""A folder of images with captions, as rows, and its pictures as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...control_image import fit_image
from ...extras import require
from .captions import is_table, read_table, read_text
from .problems import Problems

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CONTROL_FOLDER = "control"
_INSIDE = f"{CONTROL_FOLDER}/"
_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image, its captions and its control image; paths are POSIX, relative to the folder."""

    path: str
    captions: tuple[str, ...]
    control: str | None = None


def read_folder(folder: str | Path, problems: Problems, with_control: bool = False
                ) -> list[ImageRow]:
    """Every image below `folder` with its captions, sorted by path.

    Captions are the lines of a `.txt` file beside the image and those that tables
    (captions.jsonl, metadata.jsonl, *.parquet) in any folder give it: several captions of one
    image are variants. The control image of an image is the one that a table names, or
    control/<path of the image> with any image suffix; control images are never images to train on,
    and with `with_control` every image needs one. What cannot be used goes to `problems`. Raises
    ValueError for a folder that is not there or holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    images, texts, tables = _walk(folder)
    stems = {_stem(path) for path in images}
    paired = {_stem(path.removeprefix(_INSIDE)): path for path in images
              if path.startswith(_INSIDE) and _stem(path.removeprefix(_INSIDE)) in stems}
    named, named_controls = _from_tables(folder, tables, images, problems, with_control)
    hints = {*paired.values(), *named_controls.values()}
    rows = []
    unused = set(texts)
    for path in images:
        text = f"{_stem(path)}.txt"
        if path in hints:
            continue
        captions = named.get(path, ())
        if text in texts:
            unused.discard(text)
            try:
                captions = (*captions, *read_text(folder / text))
            except ValueError as error:
                problems.add(str(error))
                continue
        if not captions:
            problems.add(f"{folder / path} has no caption")
            continue
        control = named_controls.get(path) or paired.get(_stem(path))
        if with_control and control is None:
            problems.add(f"{folder / path} has no control image "
                         f"({folder / CONTROL_FOLDER / path} was expected)")
            continue
        rows.append(ImageRow(path, tuple(dict.fromkeys(captions)),
                             control if with_control else None))
    for path in sorted(unused):
        problems.add(f"{folder / path} has no image beside it")
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return rows


def find_images(folder: str | Path) -> list[str]:
    """Paths of every image below `folder`, relative to it and sorted, captioned or not.

    Raises ValueError for a folder that is not there or holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    images = sorted(_walk(folder)[0])
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _walk(folder: Path) -> tuple[list[str], set[str], list[str]]:
    """Images, texts and tables below a folder; hidden ones are left aside."""
    images: list[str] = []
    texts: set[str] = set()
    tables: list[str] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # links that lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(root).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                images.append(prefix + name)
            elif is_table(name):
                tables.append(prefix + name)
            elif suffix == ".txt":
                texts.add(prefix + name)
    return sorted(images), texts, sorted(tables)


def _from_tables(folder: Path, tables: Iterable[str], images: Iterable[str], problems: Problems,
                 with_control: bool) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Captions and control images that tables name, by image."""
    known = set(images)
    captions: dict[str, tuple[str, ...]] = {}
    controls: dict[str, str] = {}
    for table in tables:
        for row in read_table(folder / table, problems):
            path = _relative(folder, row.file)
            if path not in known:
                problems.add(f"{row.where}: there is no image {row.file}")
                continue
            captions[path] = captions.get(path, ()) + row.captions
            if row.control is None:
                continue
            control = _relative(folder, row.control)
            if controls.setdefault(path, control) != control:
                problems.add(f"{row.where}: {path} has the control image {controls[path]} already")
            elif with_control and not (folder / control).is_file():
                problems.add(f"{row.where}: there is no control image {row.control}")
    return captions, controls


def _relative(folder: Path, path: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels as the picture is seen, from its header alone.

    Raises ValueError for a file that is no picture.
    """
    pil = require("PIL.Image", "reading images", extra="train")
    try:
        with pil.open(path) as image:
            exif = pil.Exif()
            exif.load(image.info.get("exif", b""))
            width, height = image.size
            return (width, height) if exif.get(_ORIENTATION) in _LYING else (height, width)
    except Exception as error:  # decoders raise whatever their library does
        raise _unreadable(path, error) from error


def load_picture(path: Path, height: int, width: int) -> Tensor:
    """A picture scaled to cover height x width and cut evenly (LANCZOS): uint8 (3, H, W).

    Turned upright as its EXIF data say, on white where it is transparent. Raises ValueError for a
    file that is damaged, cut short or no picture.
    """
    from PIL import Image, ImageOps

    image = _open_rgb(path, background=(255, 255, 255))
    return _pixels(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def load_hint(path: Path, height: int, width: int) -> Tensor:
    """A control image fitted as `fit_image` does: float32 (3, H, W) in 0..1.

    Black where it is transparent, which is where no line is.
    """
    pixels = _pixels(_open_rgb(path, background=(0, 0, 0)))[None].float() / 255
    return fit_image(pixels, height, width)[0]


def _open_rgb(path: Path, background: tuple[int, int, int]) -> Image:
    pil = require("PIL.Image", "reading images", extra="train")
    from PIL import ImageOps

    try:
        with pil.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = _eight_bits(image)
            if image.has_transparency_data:
                flat = pil.new("RGBA", image.size, (*background, 255))
                image = pil.alpha_composite(flat, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # decoders raise whatever their library does
        raise _unreadable(path, error) from error


def _eight_bits(image: Image) -> Image:
    """16-bit grey as 8-bit grey, which Pillow by itself would cut off at 255."""
    import numpy
    from PIL import Image as PILImage

    values = numpy.asarray(image).astype(numpy.float32) / 257
    return PILImage.fromarray(values.round().clip(0, 255).astype(numpy.uint8))


def _pixels(image: Image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def _unreadable(path: Path, error: Exception) -> Exception:
    if isinstance(error, MemoryError | ImportError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if str(path) in reason else f"{path} cannot be read as a picture: {reason}"
    return ValueError(reason)
