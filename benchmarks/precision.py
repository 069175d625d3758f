"""Rounding error of half precision on the official outputs in tests/golden: ours and ComfyUI's.

`python -m benchmarks.precision` prints the norm of the difference over the norm of the official
float32 output, for each case; ComfyUI's own PixArt is measured on epsilon, all that it returns,
one sample at a time, because it takes no mask.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import pixart_core as pc

from .comfyui import ComfyUI, import_comfyui
from .contenders import comfyui_network
from .measure import command, machine, table, versions

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = 4  # of eight output channels
INPUTS = ("x", "timestep", "caption", "caption_mask", "image_size", "aspect_ratio")


def cases() -> list[str]:
    """Names of the golden files that hold a transformer."""
    return sorted(p.stem for p in (*GOLDEN.glob("alpha_*"), *GOLDEN.glob("sigma_*")))


def read_case(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, the other tensors (`in.*`, `out`), and the fields a config cannot read from them."""
    tensors, meta = _read(name)
    source = _read(meta["weights"])[0] if "weights" in meta else tensors
    weights = {k.removeprefix("weights."): v for k, v in source.items()
               if k.startswith("weights.")}
    return weights, tensors, {k: meta[k] for k in ("num_heads", "kv_compression") if k in meta}


def our_error(name: str, dtype: torch.dtype, device: torch.device,
              channels: int | None = None) -> float:
    """Relative error of our transformer in `dtype` on all output channels or the first ones."""
    weights, tensors, fields = read_case(name)
    model = pc.load_transformer(weights, dtype=dtype, device=device, **fields)
    inputs = [tensors[f"in.{k}"].to(device) if f"in.{k}" in tensors else None for k in INPUTS]
    return _relative(model(*inputs)[:, :channels], tensors["out"][:, :channels])


def comfyui_error(comfyui: ComfyUI, name: str, dtype: torch.dtype, device: torch.device) -> float:
    """The same of ComfyUI's own, on epsilon; raises whatever it raises."""
    weights, tensors, fields = read_case(name)
    config = pc.detect_config(weights, **fields)
    weights.pop("pos_embed", None)
    weights.setdefault("y_embedder.y_embedding",
                       torch.zeros(config.max_tokens, config.caption_channels))
    if config.kv_compression:
        raise ValueError("no KV compression: its loader never asks for it")
    network = comfyui_network(comfyui, config, weights, dtype, device)
    rows = []
    for i, x in enumerate(tensors["in.x"].to(device, dtype)):
        one = slice(i, i + 1)
        mask = tensors["in.caption_mask"][one].bool() if "in.caption_mask" in tensors else ...
        caption = tensors["in.caption"][one][mask].reshape(1, -1, config.caption_channels)
        extra = {}
        if config.micro_conditioning:
            extra = {"c_size": tensors["in.image_size"][one].to(device, dtype),
                     "c_ar": tensors["in.aspect_ratio"][one].to(device, dtype)}
        rows.append(network(x[None], tensors["in.timestep"][one].to(device),
                            caption.to(device, dtype), **extra))
    out = torch.cat(rows)
    return _relative(out, tensors["out"][:, : out.shape[1]])


def measure(device: torch.device, comfyui: ComfyUI | str) -> str:
    """The table, and below it what ComfyUI's own cannot run and why."""
    def row(name: str, kind: str, error: Callable[..., float], *extra: object) -> list[str]:
        return [name, kind, *(f"{error(name, dtype, device, *extra):.2e}" for dtype in DTYPES)]

    rows: list[list[str]] = []
    why = {comfyui: cases()} if isinstance(comfyui, str) else {}  # what could not be, by reason
    for name in cases():
        rows.append(row(name, "ours", our_error))
        if isinstance(comfyui, str):
            continue
        try:
            theirs = row(name, "ComfyUI's own, epsilon", functools.partial(comfyui_error, comfyui))
        except Exception as error:  # others' code, and cases it may not support
            why.setdefault(f"{type(error).__name__}, {error}", []).append(name)
        else:
            rows += [row(name, "ours, epsilon", our_error, EPSILON), theirs]
    header = ["case", "network", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]
    return table(header, rows) + "".join(f"\nNot by ComfyUI's own ({reason}): {', '.join(names)}.\n"
                                         for reason, names in why.items())


def main(argv: Sequence[str] | None = None) -> str:
    """Measure, print and return the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--comfyui", help="a ComfyUI folder, else COMFYUI_PATH or ~/comfy/ComfyUI")
    options = parser.parse_args(argv)
    device, comfyui = torch.device(options.device), import_comfyui(options.comfyui)
    others = {} if isinstance(comfyui, str) else {"ComfyUI": comfyui.version}
    with torch.inference_mode():
        report = (f"Machine: {machine(device)}; {versions(**others)}.\n\n"
                  f"Command: `{command()}`\n\n{measure(device, comfyui)}")
    print(report)
    return report


def _relative(out: Tensor, expected: Tensor) -> float:
    return ((out.float().cpu() - expected).norm() / expected.norm()).item()


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["meta"])


if __name__ == "__main__":
    main()
