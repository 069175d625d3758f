"""A transformer of full size, written, loaded and run once: memory and time of loading.

`python -m benchmarks.full_size` writes PixArt-Sigma XL/2 with random weights (611 million
parameters, 1.2 GB) to a temporary folder, as .safetensors and as .pth, loads each in a fresh
process, and fails when loading takes more than the weights and 1.5 GB, or the output is not finite.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import pixart_core as pc

from .contenders import make_step, random_weights
from .measure import MIB, command, machine, peak_memory, show, table, versions

ALLOWED = 1.5e9
PIXELS = 512
HALF_PIXELS = 64  # CPUs without half-precision instructions take minutes for more


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments().parse_args(argv)
    if options.child:
        print(json.dumps(_child(options.child, options.dtype, options.pixels)))
        return
    config = pc.PRESETS["sigma-1024"].replace(depth=options.depth)
    rows, good = [], True
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for path, dtype, target in written_files(Path(folder), config):
            pixels = options.pixels if target == "float32" else HALF_PIXELS
            found = load_elsewhere(path, target, pixels)
            allowed = found["weights"] + ALLOWED
            verdict = "yes" if found["peak"] <= allowed and found["finite"] else "NO"
            good = good and verdict == "yes"
            rows.append([path.name, dtype, target or "its own", f"{found['load']:.1f} s",
                         *(f"{found[k] / MIB:.0f} MiB" for k in ("weights", "start", "peak")),
                         f"{show(found['forward'])} at {pixels} px", found["finite"], verdict])
            path.unlink()
    header = ["file", "stored", "loaded as", "loading", "weights", "RSS before", "peak RSS",
              "one pass", "finite", "within weights + 1.5 GB"]
    print(f"Machine: {machine(torch.device('cpu'))}; {versions()}.\n\nCommand: `{command()}`\n\n"
          + table(header, rows))
    if not good:
        raise SystemExit("loading took more memory than it may, or the output is not finite")


def written_files(folder: Path,
                  config: pc.PixArtConfig) -> Iterator[tuple[Path, str, str | None]]:
    """Each file in turn, its dtype and the dtype to load it in; the caller deletes it."""
    weights = random_weights(config)
    half, brain = torch.float16, torch.bfloat16
    for dtype, target in ((brain, None), (half, None), (half, "float32")):
        state = {name: weight.to(dtype) for name, weight in weights.items()}
        path = folder / "sigma.safetensors"
        pc.write_checkpoint(path, state, {"pixart_config": config.to_json()})
        yield path, _name(dtype), target
        if target is None:
            path = folder / "sigma.pth"
            torch.save({"state_dict": state}, path)
            yield path, _name(dtype), target


def load_elsewhere(path: Path, target: str | None, pixels: int) -> dict[str, Any]:
    """What `_child` measures, from a fresh process; ends this one when that fails."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--child", str(path),
               "--pixels", str(pixels), *(["--dtype", target] if target else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parents[1])
    if result.returncode:
        raise SystemExit(f"loading {path.name} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def _child(path: str, dtype: str | None, pixels: int) -> dict[str, Any]:
    """Load `path` in this process and run it once; bytes and seconds."""
    start, before = time.perf_counter(), peak_memory()
    model = pc.load_transformer(path, dtype=getattr(torch, dtype) if dtype else None)
    load, peak = time.perf_counter() - start, peak_memory()
    weights = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    step = make_step(model.config, pixels, 1, torch.device("cpu"), seed=0)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model(step.x, step.timestep, step.captions[0])
    return {"load": load, "start": before, "peak": peak, "weights": weights,
            "forward": time.perf_counter() - start, "finite": bool(out.isfinite().all())}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", help="where the temporary folder is made; 2.5 GB are needed")
    parser.add_argument("--depth", type=int, default=28, help="blocks")
    parser.add_argument("--pixels", type=int, default=PIXELS,
                        help="of the pass in float32")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
