"""What quantising the transformer costs in pictures: PSNR to the 16-bit ones, and prompts obeyed.

`python -m benchmarks.quantized` quantises the starter by every method (`pixart quantize`), draws
held-out prompts with each file and the same noise, and sets the pictures against those of the
unquantised model. PSNR is of 8-bit pictures over all prompts (the mean of each picture's), the
share of prompts with every attribute right is the judge's.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import pixart_core as pc
from pixart_core.cli import app
from pixart_core.quant.policy import METHODS
from pixart_core.starter import Starter, find_starter
from pixart_core.training.evaluate import (
    DrawSettings,
    Prompt,
    draw_pictures,
    held_out_prompts,
    report,
)
from pixart_core.training.scenes import draw_scene, full_caption

from .held_out import SCENES
from .measure import MIB, command, machine, table, versions

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXTRA = {"svdquant + GPTQ": ["--method", "svdquant", "--gptq", "--rows", "4096"]}


def main(argv: Sequence[str] | None = None) -> str:
    """Quantise, draw, compare, print and return the report."""
    options = _arguments().parse_args(argv)
    starter = find_starter()
    source = starter.lcm if options.lcm else starter.transformer
    prompts = held_out_prompts(options.prompts, settings=SCENES)
    settings = DrawSettings(steps=options.steps, seed=options.seed,
                            guidance=None if options.lcm else starter.guidance)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original, words = _drawn(starter, source, prompts, settings, options.dtype)
        rows = [["16 bits", f"{source.stat().st_size / MIB:.2f}", "", "", words]]
        for label in options.methods:
            file = folder / "quantized.safetensors"
            _quantize(label, starter, source, file, folder)
            drawn, words = _drawn(starter, file, prompts, settings, options.dtype)
            values = [psnr(a, b) for a, b in zip(drawn, original, strict=True)]
            rows.append([label, f"{file.stat().st_size / MIB:.2f}",
                         f"{sum(values) / len(values):.1f}", f"{min(values):.1f}", words])
            file.unlink()
    shown = "\n".join([
        f"Machine: {machine(CPU)}; {versions()}.\n", f"Command: `{command()}`\n",
        table(["method", "MiB", "PSNR, dB", "lowest", "prompts with all right"], rows)])
    print(shown)
    if options.out:
        options.out.write_text(shown)
    return shown


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between two pictures (3, H, W) in 0..1, as 8 bits hold them; at most 99."""
    error = ((a * 255).round() - (b * 255).round()).square().mean().item()
    return min(10 * math.log10(255**2 / error), 99.0) if error else 99.0


def _drawn(starter: Starter, file: Path, prompts: Sequence[Prompt], settings: DrawSettings,
           dtype: str) -> tuple[list[Tensor], str]:
    """The pictures of a model file, and in words how many prompts it obeyed in everything."""
    pipeline = pc.Pipeline.from_files(file, starter.t5_file, starter.vae, dtype=DTYPES[dtype],
                                      device="cpu")
    pictures = draw_pictures(pipeline, prompts, settings)
    share = report([p.scene for p in prompts], pictures,
                   [p.caption.named for p in prompts]).rows["all"]["all"]
    return pictures, f"{100 * share.mean:.1f} %"


def _quantize(label: str, starter: Starter, source: Path, target: Path, folder: Path) -> None:
    arguments = EXTRA.get(label, ["--method", label])
    if "svdquant" in label:
        words = folder / "captions.txt"
        scenes = [draw_scene(7, i, SCENES) for i in range(16)]
        words.write_text("\n".join(full_caption(s, 7, i) for i, s in enumerate(scenes)))
        arguments = [*arguments, "--t5", str(starter.t5_file), "--prompts", str(words),
                     "--count", str(len(scenes))]
        if source != starter.lcm:  # as the pictures are drawn
            arguments += ["--guidance", str(starter.guidance)]
    if app(["quantize", str(source), str(target), *arguments], standalone_mode=False):
        raise SystemExit(f"pixart quantize failed for {label}")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *EXTRA],
                        choices=[*METHODS, *EXTRA])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, help="[the model's own]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lcm", action="store_true", help="the few-step student")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
