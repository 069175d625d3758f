"""`python -m benchmarks.showcase`: the README's picture, drawn by the starter models.

Held-out scenes, 20 steps of the base model above, 4 LCM steps of its student below.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image

import pixart_core as pc
from benchmarks.scenes import caption, sample_scene
from pixart_core.starter import find_starter

OUT = Path(__file__).parents[1] / "assets" / "starter.jpg"
COLUMNS, TILE, GAP = 8, 128, 4


def main() -> None:
    starter = find_starter()
    rng = random.Random(11)
    prompts = [caption(sample_scene(rng, True), rng, full=True) for _ in range(COLUMNS)]
    rows = []
    for path in (starter.transformer, starter.lcm):
        pipeline = pc.Pipeline.from_files(path, starter.t5_file, starter.vae,
                                          dtype=torch.float32, device="cpu")
        rows.append(pipeline.generate(prompts, seed=1))
    step = TILE + GAP
    sheet = Image.new("RGB", (COLUMNS * step + GAP, 2 * step + GAP), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = picture.resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (GAP + x * step, GAP + y * step))
    OUT.parent.mkdir(exist_ok=True)
    sheet.save(OUT, quality=90)


if __name__ == "__main__":
    main()
