"""Pictures, captions and settings that the tests of the training cache share."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from pixart_core.starter import find_starter
from pixart_core.training.data import CachedSamples, CacheSettings

STARTER = find_starter()
SHAPES = {"wide": (96, 48), "square": (64, 64), "tall": (48, 96)}  # width, height
PLAIN = CacheSettings(variant="alpha", image_size=64, max_tokens=24, dtype="float32",
                      clean_caption=False, batch_size=4, workers=2)


def changed(**options) -> CacheSettings:
    return CacheSettings(**{**vars(PLAIN), **options})


def draw(path: Path, seed: int = 0, size=(64, 64), caption: str | None = "a red circle") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (40 * seed % 256, 90, 200))
    image.paste((250, 20 * seed % 256, 10), (8, 8, 30, 40))
    image.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def fill(folder: Path, count: int = 3) -> Path:
    """`count` pictures of each of three shapes; caption and colours say which is which."""
    for number in range(count):
        for shape, size in SHAPES.items():
            draw(folder / f"{shape}{number}.png", number, size,
                 f"a {shape} circle\na {shape} circle {number}")
    return folder


def all_rows(samples: CachedSamples, epochs: int = 1) -> list[tuple[str, torch.Tensor]]:
    """Caption and latents of every row of one epoch, or of several."""
    batches = [samples.batch(i, 1) for i in range(epochs * samples.batches_per_epoch(1))]
    return [(batch.texts[0], batch.latents[0]) for batch in batches]
