"""Our transformer against diffusers' and ComfyUI's own, in turn in one process on one torch.

`python -m benchmarks.transformer` times PixArt-Sigma XL/2 with random weights at 512, 1024 and
2048 px, for one prompt and for a guidance pair of unequal captions, compares every output with
ours in float32, and measures what preparing a caption once saves. On CUDA it adds peak memory and
the attention back ends. On a CPU pass a smaller --depth (one, or one per size): time is
proportional to it but for the embedders and the last layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pixart_core as pc

from .attention import measure_attention
from .comfyui import ComfyUI, import_comfyui
from .contenders import Contender, Step, all_contenders, make_step, ours, pad, random_weights
from .measure import MIB, command, interleave, machine, show, table, versions

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report."""
    options = _arguments().parse_args(argv)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype]
    depths = options.depth * len(options.sizes) if len(options.depth) == 1 else options.depth
    if len(depths) != len(options.sizes):
        raise SystemExit(f"{len(depths)} depths for {len(options.sizes)} sizes; pass one, or one "
                         "for each size")
    base = pc.PRESETS["sigma-1024"]
    comfyui = import_comfyui(options.comfyui)
    others = {} if isinstance(comfyui, str) else {"ComfyUI": comfyui.version}
    sections: list[str] = []

    def say(*lines: str) -> None:
        sections.extend(lines)
        print(*lines, sep="\n", flush=True)

    say(f"Machine: {machine(device)}; {versions(**others)}.\n", f"Command: `{command()}`\n")
    with torch.inference_mode():
        for pixels, depth in zip(options.sizes, depths, strict=True):
            say(*_measure_size(base.replace(depth=depth), base.depth, pixels, dtype, device,
                               comfyui, options))
        if device.type == "cuda":
            say(measure_attention(options.sizes, dtype, device, options.repeats))
    report = "\n".join(sections)
    if options.out:
        options.out.write_text(report)
    return report


def _measure_size(config: pc.PixArtConfig, full_depth: int, pixels: int, dtype: torch.dtype,
                  device: torch.device, comfyui: ComfyUI | str,
                  options: argparse.Namespace) -> list[str]:
    weights = {k: v.to(device) for k, v in random_weights(config).items()}
    compile_with = torch.compile if options.compile else None
    contenders, missing = all_contenders(config, weights, pixels, dtype, device, comfyui,
                                         compile_with)
    if options.contenders:
        contenders = [c for c in contenders if any(n in c.name for n in options.contenders)]
    reference = ours(config, weights, torch.float32, device)
    part = "" if config.depth == full_depth else f", {config.depth} of {full_depth} blocks"
    title = f"{pixels} x {pixels} px, {str(dtype).removeprefix('torch.')}{part}"
    title += ", torch.compile" if options.compile else ""
    title += ", CPU seconds" if options.cpu_time else ""
    rows = []
    for batch in options.batches:
        steps = [make_step(config, pixels, batch, device, seed) for seed in range(options.inputs)]
        rows += _measure_batch(contenders, missing, reference, steps, options, device)
    header = ["batch", "contender", "median (min to max)", f"against {contenders[0].name}",
              "error"]
    header += ["memory above the weights"] if device.type == "cuda" else []
    return [f"#### {title}\n", table(header, rows),
            *(_caption_lines(config, weights, dtype, device, options, part))]


def _measure_batch(contenders: Sequence[Contender], missing: dict[str, str],
                   reference: pc.PixArtTransformer, steps: Sequence[Step],
                   options: argparse.Namespace, device: torch.device) -> list[list[object]]:
    """Rows of the table; the warm-up run is the one whose output is compared."""
    batch = len(steps[0].x)
    expected = reference(steps[0].x, steps[0].timestep, *pad(steps[0].captions))[:, :4]
    calls, errors, failed = {}, {}, dict(missing)
    for contender in contenders:
        try:
            bound = [contender.bind(step) for step in steps]
            for _ in range(2 if options.compile else 0):  # caches filled by the first call
                bound[0]()  # make a compiled network compile again at the second
            errors[contender.name] = _error(bound[0](), expected)
            calls[contender.name] = bound
        except Exception as error:  # others' code, and sizes it may not support
            failed[contender.name] = f"{type(error).__name__}: {error}"
    if not calls:
        raise RuntimeError(f"no contender could run: {failed}")
    timings = interleave(calls, options.repeats, device, _clock(options))
    base = timings[contenders[0].name].median if contenders[0].name in timings else float("nan")
    rows = []
    for name, timing in timings.items():
        row = [batch, name, timing, f"{timing.median / base:.2f} x", f"{errors[name]:.2e}"]
        rows.append(row + ([f"{timing.peak / MIB:.0f} MiB"] if timing.peak is not None else []))
    blanks = ["", "", ""] if device.type == "cuda" else ["", ""]
    rows += [[batch, name, f"not measured: {why}", *blanks] for name, why in failed.items()]
    return rows


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN where `out` has one."""
    return ((out.float() - expected).norm() / expected.norm()).item()


def _caption_lines(config: pc.PixArtConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype,
                   device: torch.device, options: argparse.Namespace, part: str) -> list[str]:
    """What is done once per prompt when the caption is prepared, else in every step."""
    model = ours(config, weights, dtype, device)
    lines = []
    for batch in options.batches:
        step = make_step(config, 64, batch, device, seed=0).to(dtype)
        caption, mask = pad(step.captions)

        def prepare(caption: torch.Tensor = caption, mask: Any = mask) -> Any:
            return model.prepare_caption(caption, mask)

        seconds = _median(prepare, options, device)
        lines.append(f"Preparing the caption ({caption.shape[1]} tokens, batch {batch}{part}): "
                     f"{show(seconds)}, once per prompt instead of in every step.\n")
    return lines


def _median(call: Callable[[], Any], options: argparse.Namespace,
            device: torch.device) -> float:
    call()
    return interleave({"": [call]}, options.repeats, device, _clock(options))[""].median


def _clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.cpu_time else time.perf_counter


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformer",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048],
                        help="image sides in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2],
                        help="1 is one prompt, 2 a guidance pair of unequal captions")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depth", type=int, nargs="+", default=[28],
                        help="blocks, for all sizes or for each")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inputs", type=int, default=3, help="different inputs, in rotation")
    parser.add_argument("--comfyui", help="a ComfyUI folder, else COMFYUI_PATH or ~/comfy/ComfyUI")
    parser.add_argument("--contenders", nargs="+", metavar="PART",
                        help="only those with one of these in their name; the first is the measure")
    parser.add_argument("--cpu-time", action="store_true",
                        help="seconds the process got, for a CPU that others use too; "
                             "set OMP_NUM_THREADS=1, or waiting threads are counted")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contender")
    parser.add_argument("--out", type=Path, help="write the report to this file too")
    return parser


if __name__ == "__main__":
    main()
