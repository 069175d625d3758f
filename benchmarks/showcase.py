"""`python -m benchmarks.showcase`: the README's picture, drawn by the starter models.

Held-out scenes, 20 steps of the base model above, 4 LCM steps of its student below.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import pixart_core as pc
from pixart_core.starter import find_starter
from pixart_core.training.evaluate import held_out_prompts

from .held_out import SQUARE

OUT = Path(__file__).parents[1] / "assets" / "starter.jpg"
COLUMNS, TILE, GAP = 8, SQUARE.image_size, 4


def main() -> None:
    starter = find_starter()
    prompts = [prompt.caption.text for prompt in held_out_prompts(COLUMNS, 11, SQUARE)]
    rows = []
    for path, guidance in ((starter.transformer, starter.guidance), (starter.lcm, None)):
        pipeline = pc.Pipeline.from_files(path, starter.t5_file, starter.vae,
                                          dtype=torch.float32, device="cpu")
        rows.append(pipeline.generate(prompts, seed=1, guidance=guidance))
    step = TILE + GAP
    sheet = Image.new("RGB", (COLUMNS * step + GAP, 2 * step + GAP), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (GAP + x * step, GAP + y * step))
    OUT.parent.mkdir(exist_ok=True)
    sheet.save(OUT, quality=90)


if __name__ == "__main__":
    main()
