"""Quantising a transformer of full size: time, memory and size of every method.

`python -m benchmarks.quantize` writes PixArt-Sigma XL/2 (611 million parameters) with random
weights, planted outlier channels and encoded random captions to a temporary folder, and runs
`pixart quantize` on it, each method in a fresh process. It fails where SVDQuant takes more than 20
minutes or any method more than 8 GB. Errors are of random weights; trained ones are lower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.quant.policy import METHODS
from pixart_core.text.embeddings import CaptionEntry, save_embeddings

from .contenders import random_weights
from .measure import MIB, command, machine, peak_memory, show, table, versions

SECONDS, BYTES = 20 * 60, 8e9
OUTLIERS, FACTOR = 61, 8.0  # every so many input channels is so many times as large
TOKENS = 40
_CHILD = ("import json, sys, time; from benchmarks.quantize import quantize; "
          "print(json.dumps(quantize(sys.argv[1:])))")


def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report; SystemExit where a limit is passed."""
    options = _arguments().parse_args(argv)
    config = pc.PRESETS["sigma-1024"].replace(depth=options.depth)
    rows, good = [], True
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model = write_model(folder / "model.safetensors", config)
        captions, negative = write_captions(folder, config, options.count)
        size = model.stat().st_size
        for method in options.methods:
            target, report = folder / f"{method}.safetensors", folder / f"{method}.json"
            flags = ["--method", method, "--report", str(report)]
            if METHODS[method].calibrated:
                flags += ["--embeddings", str(captions), "--negative-embeddings", str(negative),
                          "--size", str(options.pixels), "--steps", str(options.steps)]
            found = in_a_process([str(model), str(target), *flags])
            limit = SECONDS if METHODS[method].calibrated else None
            kept = found["peak"] <= BYTES and (limit is None or found["seconds"] <= limit)
            good = good and kept
            errors = json.loads(report.read_text())["mean"]["all"]
            rows.append([method, f"{found['seconds'] / 60:.1f} min"
                         if found["seconds"] > 60 else show(found["seconds"]),
                         f"{found['peak'] / MIB:.0f} MiB", f"{target.stat().st_size / MIB:.0f} MiB",
                         f"{size / target.stat().st_size:.2f} x",
                         ", ".join(f"{what} {value:.1%}" for what, value in errors.items()),
                         "yes" if kept else "NO"])
            target.unlink()
    text = (f"Machine: {machine(torch.device('cpu'))}; {versions()}.\n\nCommand: `{command()}`\n\n"
            f"{options.depth} of 28 blocks, float16, {size / MIB:.0f} MiB; SVDQuant draws "
            f"{options.count} captions at {options.pixels} px in {options.steps} steps.\n\n"
            + table(["method", "time", "peak memory", "file", "smaller", "mean error of layers",
                     "within the limits"], rows))
    print(text)
    if options.out:
        options.out.write_text(text)
    if not good:
        raise SystemExit("a method took more time or memory than it may")
    return text


def write_model(path: Path, config: pc.PixArtConfig) -> Path:
    """A float16 file of random weights, some input channels of which are large."""
    weights = random_weights(config)
    for name, weight in weights.items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            weight[:, ::OUTLIERS] *= FACTOR
    pc.write_checkpoint(path, {name: w.half() for name, w in weights.items()},
                        {METADATA_KEY: config.to_json()})
    return path


def write_captions(folder: Path, config: pc.PixArtConfig, count: int) -> tuple[Path, Path]:
    """Encoded captions of random states, and the negative one."""
    generator = torch.Generator().manual_seed(0)
    paths = folder / "captions.safetensors", folder / "negative.safetensors"
    for path, number in zip(paths, (count, 1), strict=True):
        states = torch.randn(number, TOKENS, config.caption_channels, generator=generator)
        save_embeddings(path, [CaptionEntry(states)], {})
    return paths


def in_a_process(arguments: Sequence[str]) -> dict[str, Any]:
    """What `quantize` measures, from a fresh process; ends this one when that fails."""
    result = subprocess.run([sys.executable, "-c", _CHILD, *arguments], capture_output=True,
                            text=True, check=False, cwd=Path(__file__).parents[1])
    if result.returncode:
        raise SystemExit(f"pixart quantize failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def quantize(arguments: Sequence[str]) -> dict[str, float]:
    """Run `pixart quantize` here; its seconds and this process's largest memory in bytes."""
    from pixart_core.cli import app

    start = time.perf_counter()
    app(["quantize", *arguments], standalone_mode=False)
    return {"seconds": time.perf_counter() - start, "peak": peak_memory()}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--depth", type=int, default=28, help="blocks of XL/2")
    parser.add_argument("--count", type=int, default=4, help="captions that SVDQuant draws")
    parser.add_argument("--pixels", type=int, default=192, help="of the pictures it draws")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the report to")
    return parser


if __name__ == "__main__":
    main()
