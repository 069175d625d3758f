"""PyTorch's attention back ends at PixArt's head dimension, 72, which not every kernel likes.

`python -m benchmarks.attention` times self-attention and cross-attention to a masked caption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .measure import MIB, command, interleave, machine, show, table, versions

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
HEADS, HEAD_DIM, CAPTION = 16, 72, 300


def measure_attention(sizes: Sequence[int], dtype: torch.dtype, device: torch.device,
                      repeats: int, head_dims: Sequence[int] = (HEAD_DIM, 64, 80)) -> str:
    """One table: milliseconds of a block's attentions, or why a back end cannot run them.

    64 and 80 stand beside 72 to show what a kernel's padding of the head costs.
    """
    rows = []
    for pixels in sizes:
        tokens = (pixels // 16) ** 2
        for dim in head_dims:
            kinds = [("self", tokens, None), ("cross, masked", CAPTION, CAPTION // 8)]
            for kind, keys, valid in kinds if dim == HEAD_DIM else kinds[:1]:
                q, k, v = (torch.randn(1, HEADS, n, dim, device=device, dtype=dtype)
                           for n in (tokens, keys, keys))
                mask = None
                if valid is not None:
                    mask = torch.arange(keys, device=device)[None, None, None] < valid
                rows += [[pixels, kind, dim, name, *cells]
                         for name, cells in _backends(q, k, v, mask, repeats).items()]
    header = ["px", "attention", "head", "back end", "median", "memory"]
    return f"#### Attention back ends, {dtype}\n\n" + table(header, rows)


def _backends(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
              repeats: int) -> dict[str, tuple[str, str]]:
    def default() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    calls, cells = {"PyTorch's choice": [default]}, {}
    for name, backend in BACKENDS.items():
        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        try:
            call()
            calls[name] = [call]
        except RuntimeError as error:  # out of memory is one too
            cells[name] = (f"no: {str(error).splitlines()[0][:60]}", "")
    default()
    timings = interleave(calls, repeats, q.device)
    timed = {name: (show(t.median), "" if t.peak is None else f"{t.peak / MIB:.0f} MiB")
             for name, t in timings.items()}
    return timed | cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    print(f"Machine: {machine(device)}; {versions()}.\n\nCommand: `{command()}`\n")
    with torch.inference_mode():
        print(measure_attention(options.sizes, getattr(torch, options.dtype), device,
                                options.repeats))


if __name__ == "__main__":
    main()
