"""`pixart quantize --from deepcompressor`: a folder that it wrote to one file."""

from __future__ import annotations

import dataclasses

import torch
import typer

from ..load import read_transformer
from ..quantize.deepcompressor import read_deepcompressor
from ..quantize.network import Network
from .quantize_network import finish
from .quantize_options import Request

_NULL_CAPTION = "y_embedder.y_embedding"


def quantize_deepcompressor(request: Request) -> None:
    """Write what deepcompressor quantised; nothing is rounded again.

    `--base` is the original transformer, for the config and the null caption that diffusers' names
    leave out. Raises CheckpointError as `read_deepcompressor` and `read_transformer` do.
    """
    given = [name for name in request.calibration.given() if name != "--base"]
    if given or request.report:
        raise typer.BadParameter(f"{', '.join([*given, *(['--report'] if request.report else [])])}"
                                 " given: deepcompressor has calibrated already; leave it out")
    base = request.calibration.base
    request.calibration.require_files()
    dtype = request.dtype or torch.bfloat16
    imported = read_deepcompressor(request.source, dtype)
    fields, original = request.fields, None
    if base is not None:
        original = read_transformer(base, request.fields)
        fields = {f.name: getattr(original.config, f.name)
                  for f in dataclasses.fields(original.config)}
    opened = read_transformer(imported.state_dict, fields)
    if original is not None and _NULL_CAPTION in original.state_dict:
        opened.state_dict[_NULL_CAPTION] = original.state_dict[_NULL_CAPTION]
    network = Network(opened.state_dict, opened.config, request.source.name)
    finish(request, network, imported.stored, dtype,
           {"method": request.method.name, "from": "deepcompressor",
            "rank": max(w.tensors["proj_down"].shape[1] for w in imported.stored.values())},
           {}, imported.biases)
