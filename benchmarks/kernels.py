"""comfy-kitchen's kernels against plain PyTorch, format by format, at the widths of XL/2.

`python -m benchmarks.kernels` runs every quantised layer shape of a block on the card with the
kernels and with the eager back end, and beside the 16-bit layer: relative error of the output and
time. It needs a CUDA card; formats that a card has no kernels for are named with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_core.quant import StoredWeight
from pixart_core.quant.eight_bit import Float8E4M3
from pixart_core.quant.kitchen import EAGER
from pixart_core.quant.policy import METHODS
from pixart_core.quant.svdquant import SVDQuantSettings, solve_layer
from pixart_core.quant.svdquant_format import SVDQuant

from .measure import command, interleave, machine, show, table, versions

SHAPES = {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152),
          "mlp.fc2": (1152, 4608)}
BAR = 1e-2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report; SystemExit without a card, or past the bar."""
    options = _arguments().parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA card: there are no kernels to compare")
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    rows, worst = [], 0.0
    with torch.inference_mode():
        for name in METHODS:
            for layer, shape in SHAPES.items():
                row, error = compare(name, layer, shape, options, device, dtype)
                rows.append(row)
                worst = max(worst, error)
    report = "\n".join([
        f"Machine: {machine(device)}; {versions()}.\n", f"Command: `{command()}`\n",
        table(["method", "layer", "back end", "against eager", "against 16 bits", "kernels",
               "eager", "16 bits"], rows)])
    print(report)
    if options.out:
        options.out.write_text(report)
    if worst > BAR:
        raise SystemExit(f"a kernel is {worst:.2g} off its eager form, more than {BAR:g}")
    return report


def compare(name: str, layer: str, shape: tuple[int, int], options: argparse.Namespace,
            device: torch.device, dtype: torch.dtype) -> tuple[list[str], float]:
    """A row of the table, and the error against the eager back end (0 where that is what runs)."""
    import comfy_kitchen

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    x = torch.randn(options.tokens, shape[1], generator=generator)
    x = F.gelu(x, approximate="tanh") if layer == "mlp.fc2" else x
    stored, bias = quantized(name, weight, x[:256], layer == "mlp.fc2")
    stored = stored.to(device)
    x, bias = x.to(device, dtype), bias.to(device, dtype)
    dense, zero = weight.to(device, dtype), torch.zeros(shape[0], device=device, dtype=dtype)

    def fast() -> Tensor:
        return stored.format.linear(x, stored.tensors, bias)

    def eager() -> Tensor:
        with comfy_kitchen.use_backend(EAGER):
            return eager_linear(stored, x, bias)

    backend = stored.format.backend(device)
    exact = F.linear(x.float(), dense.float(), zero.float())
    error = _relative(fast(), eager())
    times = interleave({"fast": [fast], "eager": [eager],
                        "dense": [lambda: F.linear(x, dense, zero)]}, options.repeats, device)
    return [name, layer, str(backend), f"{error:.2e}", f"{100 * _relative(fast(), exact):.2f} %",
            *(show(times[key].median) for key in ("fast", "eager", "dense"))], error


def eager_linear(stored: StoredWeight, x: Tensor, bias: Tensor) -> Tensor:
    """What a kernel has to give, inside `use_backend(EAGER)`.

    That does not reach the product of two float8 matrices, which is PyTorch's own: it is taken of
    the rounded weight and the rounded x in float32 instead.
    """
    form = stored.format
    if not isinstance(form, Float8E4M3) or not form.runs_on(x.device, x.dtype):
        return form.linear(x, stored.tensors, bias)
    from comfy_kitchen.tensor import QuantizedTensor

    rounded = QuantizedTensor.from_float(x, form.layout).dequantize().float()
    return F.linear(rounded, stored.dense(), bias.float()).to(x.dtype)


def quantized(name: str, weight: Tensor, x: Tensor, unsigned: bool) -> tuple[StoredWeight, Tensor]:
    """A weight in a format and the bias that belongs to it, from a layer whose bias is 0."""
    zero = torch.zeros(len(weight))
    if name != "svdquant":
        return METHODS[name].format.quantize(weight), zero
    solved = solve_layer(weight, x, zero, act_unsigned=unsigned,
                         settings=SVDQuantSettings(rounds=2))
    return SVDQuant.from_layer(solved.qweight, solved.weight_scale, solved.smooth_factor,
                               solved.proj_down, solved.proj_up, unsigned), solved.bias.float()


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="rows, those of 1024 px")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
