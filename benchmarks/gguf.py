"""What GGUF's block formats cost: size, error, time and memory, of transformers and of T5.

`python -m benchmarks.gguf` writes the starter's transformer and T5 (trained weights) and a few
blocks of PixArt-Sigma XL/2 (random ones, full width) in every format, loads them packed, and sets
them against the same model unpacked. All of it computes in float32, so that the differences are
the format's. Memory is that of a process of its own, which loads the file and makes one step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pixart_core as pc
from pixart_core.checkpoint.gguf_t5 import llama_names
from pixart_core.checkpoint.gguf_write import QUANTS, storage_type, write_gguf
from pixart_core.quant import PACKINGS
from pixart_core.starter import find_starter
from pixart_core.text import T5TextEncoder
from pixart_core.text.encoder import build_encoder
from pixart_core.text.t5_file import T5Config, expected_shapes, read_t5
from pixart_core.text.t5_gguf import t5_storage_type, write_t5_gguf

from .contenders import make_step, ours, random_weights
from .measure import MIB, command, interleave, machine, peak_memory, show, table, versions

CPU = torch.device("cpu")
T5_XXL = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
PROMPTS = ("a large red circle on a blue background", "a small star in the corner", "")
TOKENS = 40  # of the starter's longest prompt
TIMESTEPS = torch.linspace(20, 980, 8).round()
_BITS = {"F32": 32, "F16": 16, "BF16": 16}
_EXAMPLE = "Q8_0"  # what is quantised at all is the same for every block format


def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report."""
    options = _arguments().parse_args(argv)
    if options.child:
        print(json.dumps(_child(options.child, options.pixels)))
        return ""
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        report = "\n".join([
            f"Machine: {machine(CPU)}; {versions()}.\n", f"Command: `{command()}`\n",
            "#### The starter's transformer, trained\n", trained(folder, options.quants),
            f"#### XL/2, {options.depth} of 28 blocks, random weights, {options.pixels} px"
            f"{', CPU seconds' if options.cpu_time else ''}\n", wide(folder, options),
            "#### The starter's T5, trained\n", text(folder, options.quants)])
    print(report)
    if options.out:
        options.out.write_text(report)
    return report


def trained(folder: Path, quants: Iterable[str]) -> str:
    """The starter: errors that matter, for its weights are no noise; XL/2's size computed."""
    starter = find_starter()
    weights, config = pc.open_transformer(starter.transformer)
    dense = pc.load_transformer(starter.transformer, dtype=torch.float32)
    encoder = T5TextEncoder.from_path(starter.t5_file, dtype=torch.float32)
    states, mask = encoder(PROMPTS[0], config.max_tokens)
    expected = _predict(dense, states[mask][None])
    shapes = _shapes(pc.PixArtTransformer(pc.PRESETS["sigma-1024"], device="meta"))
    rows = []
    for quant in quants:
        path = folder / "starter.gguf"
        write_gguf(path, weights, config, quant)
        out = _predict(pc.load_transformer(path, dtype=torch.float32), states[mask][None])
        rows.append([quant, f"{_bits(quant):g}", _mib(path.stat().st_size),
                     _percent(_weight_error(path, weights)), _percent(_relative(out, expected)),
                     _mib(_computed_size(shapes, storage_type, quant))])
    return table(["format", "bits per weight", "file", "error of the weights",
                  "error of the prediction", "XL/2"], rows)


def wide(folder: Path, options: argparse.Namespace) -> str:
    """Full width, few blocks: a step packed against the same step dense, in turn; memory."""
    config = pc.PRESETS["sigma-1024"].replace(depth=options.depth)
    weights = {name: weight.half() for name, weight in random_weights(config).items()}
    dense = ours(config, {name: w.float() for name, w in weights.items()}, torch.float32, CPU)
    step = make_step(config, options.pixels, 1, CPU, seed=0)
    models, errors, memory, sizes = {"dense": dense}, {}, {}, {}
    for quant in options.quants:
        path = folder / f"{quant}.gguf"
        write_gguf(path, weights, config, quant)
        models[quant] = pc.load_transformer(path, dtype=torch.float32)
        errors[quant], sizes[quant] = _weight_error(path, weights), path.stat().st_size
        memory[quant] = _in_a_process(path, options.pixels)
    calls = {}
    for name, model in models.items():
        caption = model.prepare_caption(step.captions[0])
        calls[name] = [lambda model=model, caption=caption:
                       model(step.x, step.timestep, caption)[:, :config.in_channels]]
    outs = {name: call() for name, (call,) in calls.items()}
    clock = time.process_time if options.cpu_time else time.perf_counter
    timings = interleave(calls, options.repeats, CPU, clock)
    base = timings["dense"].median
    rows = [["dense, float32", "", "", "", str(timings["dense"]), "1.00 x", "", ""]]
    rows += [[quant, _mib(sizes[quant]), _percent(errors[quant]),
              _percent(_relative(outs[quant], outs["dense"])), str(timings[quant]),
              f"{timings[quant].median / base:.2f} x ({show(timings[quant].median - base)})",
              _mib(memory[quant]["weights"]), _mib(memory[quant]["peak"])]
             for quant in options.quants]
    return table(["format", "file", "error of the weights", "error of the prediction", "one step",
                  "against dense", "weights in memory", "peak of loading and a step"], rows)


def text(folder: Path, quants: Iterable[str]) -> str:
    """The starter's T5; the size of T5 v1.1 XXL computed, without its tokenizer."""
    file = read_t5(find_starter().t5_file)
    plain = llama_names(file.state_dict)
    names = [name for name, tensor in plain.items()
             if t5_storage_type(name, tensor, _EXAMPLE) == _EXAMPLE]
    expected = _encode(find_starter().t5_file)
    shapes = llama_names(expected_shapes(T5_XXL))
    rows = []
    for quant in quants:
        path = folder / "t5.gguf"
        write_t5_gguf(path, file, quant)
        read = read_t5(path, torch.float32)
        stored = llama_names(read.state_dict | {k: p.dense() for k, p in read.packed.items()})
        error = sum(_relative(stored[name], plain[name].float()) for name in names) / len(names)
        rows.append([quant, _mib(path.stat().st_size), _percent(error),
                     _percent(_relative(_encode(path), expected)),
                     _mib(_computed_size(shapes, t5_storage_type, quant))])
    return table(["format", "file", "error of the weights", "error of the states", "T5 XXL"], rows)


def _predict(model: pc.PixArtTransformer, caption: Tensor) -> Tensor:
    """Epsilon of one latent for each of TIMESTEPS; `caption` (1, L, D)."""
    side = model.config.image_size // 8
    x = torch.randn(len(TIMESTEPS), model.config.in_channels, side, side,
                    generator=torch.Generator().manual_seed(0))
    size = torch.full((len(x), 2), float(model.config.image_size))
    out = model(x, TIMESTEPS, caption.expand(len(x), -1, -1), image_size=size,
                aspect_ratio=size[:, :1] / size[:, 1:])
    return out[:, :model.config.in_channels]


def _encode(path: Path) -> Tensor:
    """The states of every token of PROMPTS (N, D)."""
    file = read_t5(path, torch.float32)
    states, mask = T5TextEncoder(build_encoder(file), file.tokenizer())(PROMPTS, TOKENS)
    return states[mask]


def _weight_error(path: Path, weights: Mapping[str, Tensor]) -> float:
    """Mean relative error of the matrices that block formats quantise."""
    stored = pc.open_transformer(path)[0]
    names = [name for name, weight in weights.items()
             if storage_type(name, weight, _EXAMPLE) == _EXAMPLE]
    return sum(_relative(stored[name].float(), weights[name].float())
               for name in names) / len(names)


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _computed_size(shapes: Mapping[str, tuple[int, ...]],
                   kind: Callable[[str, Tensor, str], str], quant: str) -> float:
    """Bytes of a file of float16 weights of these shapes in a format."""
    total = 0.0
    for name, shape in shapes.items():
        weight = torch.zeros((), dtype=torch.float16).expand(shape)  # holds no memory
        total += weight.numel() * _bits(kind(name, weight, quant)) / 8
    return total


def _in_a_process(path: Path, pixels: int) -> dict[str, Any]:
    """What `_child` measures, from a fresh process; ends this one when that fails."""
    command = [sys.executable, "-m", "benchmarks.gguf", "--child", str(path),
               "--pixels", str(pixels)]
    result = subprocess.run(command, capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parents[1])
    if result.returncode:
        raise SystemExit(f"loading {path.name} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


@torch.inference_mode()
def _child(path: str, pixels: int) -> dict[str, int]:
    """Bytes of the weights of `path`, and the most memory above what was there before it."""
    before = peak_memory()
    model = pc.load_transformer(path, dtype=torch.float32)
    step = make_step(model.config, pixels, 1, CPU, seed=0)
    model(step.x, step.timestep, step.captions[0])
    return {"weights": sum(p.numel() * p.element_size() for p in model.state_dict().values()),
            "peak": peak_memory() - before}


def _bits(kind: str) -> float:
    return PACKINGS[kind].bits if kind in PACKINGS else _BITS[kind]


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error else "0"


def _mib(size: float) -> str:
    return f"{size / MIB:.1f} MiB" if size < 100 * MIB else f"{size / MIB:.0f} MiB"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--quants", nargs="+", choices=QUANTS, default=list(QUANTS))
    parser.add_argument("--depth", type=int, default=2, help="blocks of XL/2")
    parser.add_argument("--pixels", type=int, default=512, help="of the step of XL/2")
    parser.add_argument("--repeats", type=int, default=5, help="of that step")
    parser.add_argument("--cpu-time", action="store_true",
                        help="count the seconds this process got, for a machine others use too")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the report to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
