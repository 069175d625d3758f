"""What a ControlNet costs, against the least it can cost.

`python -m benchmarks.control` times a PixArt-alpha XL/2 pass plain and steered, in turn in one
process. The least is the copied blocks' share of the plain pass (13 of 28) plus the projections:
one for the control tokens and one after each copied block, which are timed alone. Memory is the
peak of a first call above the weights; a ControlNet may add one set of residuals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import pixart_core as pc

from .contenders import make_step, ours, pad, random_weights
from .measure import MIB, command, interleave, machine, show, table, versions

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report."""
    options = _arguments().parse_args(argv)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    config = pc.PRESETS["sigma-1024"].replace(depth=options.depth)
    model = ours(config, random_weights(config), dtype, device)
    net = pc.PixArtControlNet.from_base(model, options.copies)
    for name, parameter in net.named_parameters():
        if "_proj." in name and "copied_block" not in name:
            parameter.normal_(std=config.hidden_size**-0.5 / 10)
    rows = [_measure(model, net, pixels, batch, dtype, device, options)
            for pixels in options.sizes for batch in options.batches]
    header = ["pixels", "batch", "plain", "steered", "control", "least", "control / least"]
    header += ["memory plain", "memory steered", "one set of residuals"]
    report = "\n".join([
        f"Machine: {machine(device)}; {versions()}.\n", f"Command: `{command()}`\n",
        f"#### {options.copies} copied of {options.depth} blocks, {options.dtype}"
        f"{', CPU seconds' if options.cpu_time else ''}\n", table(header, rows)])
    print(report)
    if options.out:
        options.out.write_text(report)
    return report


def _measure(model: pc.PixArtTransformer, net: pc.PixArtControlNet, pixels: int, batch: int,
             dtype: torch.dtype, device: torch.device, options: argparse.Namespace) -> list[object]:
    step = make_step(model.config, pixels, batch, device, seed=0).to(dtype)
    caption, mask = pad(step.captions)
    control = [pc.Control(net, torch.randn_like(step.x[:1]))]
    tokens, _ = model.embed_latent(step.x)
    first = net.controlnet[0]

    def projections() -> None:
        first.before_proj(tokens[:1])
        for block in net.controlnet:
            block.after_proj(tokens)

    calls = {
        "plain": [lambda: model(step.x, step.timestep, caption, mask)],
        "steered": [lambda: model(step.x, step.timestep, caption, mask, control=control)],
        "projections": [projections],
    }
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")
    peaks = {name: _peak(call[0], device) - before for name, call in calls.items()}
    clock = time.process_time if options.cpu_time else time.perf_counter
    timings = interleave(calls, options.repeats, device, clock)
    plain, steered, projected = (timings[name].median for name in calls)
    cost, least = steered - plain, plain * options.copies / options.depth + projected
    row = [pixels, batch, timings["plain"], timings["steered"], show(cost), show(least),
           f"{cost / least:.3f}"]
    residuals = net.config.depth * tokens.numel() * tokens.element_size()
    return row + [f"{size / MIB:.0f} MiB" for size in (peaks["plain"], peaks["steered"], residuals)]


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """The most memory in use during a call; on a CPU Linux alone tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="pixels of a side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--depth", type=int, default=28, help="blocks of the model")
    parser.add_argument("--copies", type=int, default=13, help="copied blocks")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true",
                        help="seconds the process got; set OMP_NUM_THREADS=1")
    parser.add_argument("--out", type=Path, help="write the report to this file too")
    return parser


if __name__ == "__main__":
    main()
