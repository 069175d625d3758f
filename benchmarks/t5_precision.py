"""What T5 at fewer bits costs in captions and pictures, and saves in bytes.

`python -m benchmarks.t5_precision` encodes held-out prompts with the starter's T5 at every
precision, all computed in float32, draws them with the same noise, and sets states and pictures
against those of the unrounded T5. `--xxl` adds T5 v1.1 XXL's sizes: random weights are written to
a temporary folder, quantised to files, and each precision is loaded in a process of its own, from
the 16-bit file (rounded on the way) and from its file. That needs 22 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import pixart_core as pc
from pixart_core.checkpoint.write_stream import stream_checkpoint
from pixart_core.quant.policy import T5_METHODS
from pixart_core.starter import find_starter
from pixart_core.text import PRECISIONS, read_t5_as
from pixart_core.text.encoder import build_encoder
from pixart_core.text.t5_file import T5Config, expected_shapes
from pixart_core.text.t5_quant_file import write_quantized_t5
from pixart_core.training.evaluate import DrawSettings, Prompt, draw_pictures, held_out_prompts

from .gguf import T5_XXL
from .held_out import SCENES
from .measure import MIB, command, machine, peak_memory, table, versions
from .quantized import psnr

CPU = torch.device("cpu")
TOKENS = 300  # of PixArt-Sigma's longest prompt


def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report."""
    options = _arguments().parse_args(argv)
    if options.child:
        print(json.dumps(_child(*options.child)))
        return ""
    parts = [f"Machine: {machine(CPU)}; {versions()}.\n", f"Command: `{command()}`\n",
             f"#### The starter's T5, {options.prompts} held-out prompts\n", starter(options)]
    if options.xxl:
        config = replace(T5_XXL, num_layers=options.layers)
        parts += [f"#### T5 v1.1 XXL, {options.layers} of {T5_XXL.num_layers} blocks, random "
                  "weights, MB\n", sizes(config, options.folder)]
    report = "\n".join(parts)
    print(report)
    if options.out:
        options.out.write_text(report)
    return report


def starter(options: argparse.Namespace) -> str:
    """Errors of states and pictures of the starter family."""
    prompts = held_out_prompts(options.prompts, settings=SCENES)
    settings = DrawSettings(steps=options.steps, seed=options.seed,
                            guidance=find_starter().guidance)
    rows = []
    for precision in PRECISIONS:
        states, pictures, size = _drawn(precision, prompts, settings)
        if precision == PRECISIONS[0]:
            plain, drawn = states, pictures
            rows.append([precision, f"{size / MIB:.2f}", "", "", "", "", ""])
            continue
        a, b = torch.cat(states), torch.cat(plain)
        by_token = (a - b).norm(dim=1) / b.norm(dim=1)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
        values = [psnr(x, y) for x, y in zip(pictures, drawn, strict=True)]
        rows.append([precision, f"{size / MIB:.2f}", f"{100 * ((a - b).norm() / b.norm()):.2g} %",
                     f"{100 * by_token.max():.2g} %", f"{cosine.min():.5f}",
                     f"{sum(values) / len(values):.1f}", f"{min(values):.1f}"])
    return table(["precision", "MiB", "error of the states", "of the worst token",
                  "lowest cosine of a token", "PSNR, dB", "lowest"], rows)


def _drawn(precision: str, prompts: Sequence[Prompt], settings: DrawSettings,
           ) -> tuple[list[Tensor], list[Tensor], int]:
    """States and pictures of every prompt, and the bytes of the encoder."""
    family = find_starter()
    file = read_t5_as(family.t5_file, precision)
    size = sum(t.nbytes for t in (*file.state_dict.values(), *file.packed.values()))
    pipeline = pc.Pipeline.from_files(family.transformer, family.t5_file, family.vae,
                                      dtype=torch.float32, device="cpu", t5_precision=precision)
    limit = pipeline.config.max_tokens
    states = [pipeline.encoder.states(prompt.caption.text, limit) for prompt in prompts]
    return states, draw_pictures(pipeline, prompts, settings), size


def sizes(config: T5Config, folder: str | None) -> str:
    """Bytes of files, and the most memory of loading and of encoding, above an empty process."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        source, file = Path(name, "t5.safetensors"), Path(name, "quantized.safetensors")
        write_random_t5(source, config)
        for precision in PRECISIONS[1:]:
            loads = [_in_a_process(source, precision)]
            written = ""
            if precision in T5_METHODS:
                write_quantized_t5(source, file, precision)
                written = _megabytes(file.stat().st_size)
                loads.append(_in_a_process(file, PRECISIONS[0]))
                file.unlink()
            kept = loads[0]["kept"]
            rows.append([precision, written, _megabytes(kept),
                         *(_megabytes(loads[0][phase]) for phase in ("load", "encode")),
                         _megabytes(loads[1]["load"]) if written else ""])
    return table(["precision", "file", "kept", "most while rounding and loading",
                  f"most, {TOKENS} tokens encoded", "most while loading the file"], rows)


def write_random_t5(path: Path, config: T5Config) -> None:
    """A 16-bit T5 of these sizes, one matrix in memory at a time."""
    shapes = expected_shapes(config)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            # in bfloat16 from the start: float32 noise would take twice the memory
            noise = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
            yield name, torch.ones_like(noise) if len(shape) == 1 else noise.mul_(0.02)

    stream_checkpoint(path, tensors(), {"format": "pt"}, 300 * len(shapes))


def _in_a_process(path: Path, precision: str) -> dict[str, int]:
    """What `_child` measures, from a fresh process; ends this one when that fails."""
    run = [sys.executable, "-m", "benchmarks.t5_precision", "--child", str(path), precision]
    result = subprocess.run(run, capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parents[1])
    if result.returncode:
        raise SystemExit(f"{precision} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


@torch.inference_mode()
def _child(path: str, precision: str) -> dict[str, int]:
    import comfy_kitchen  # noqa: F401  its own memory is not the encoder's

    before = peak_memory()
    file = read_t5_as(path, precision)
    kept = sum(t.nbytes for t in (*file.state_dict.values(), *file.packed.values()))
    load = peak_memory() - before
    model = build_encoder(file)
    model(input_ids=torch.arange(TOKENS)[None] % file.config.vocab_size)
    return {"kept": kept, "load": load, "encode": peak_memory() - before}


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.t5_precision",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--xxl", action="store_true", help="write and load T5 XXL's sizes, too")
    parser.add_argument("--layers", type=int, default=T5_XXL.num_layers, help="of --xxl")
    parser.add_argument("--folder", help="where the temporary folder of --xxl is made")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the report to")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
