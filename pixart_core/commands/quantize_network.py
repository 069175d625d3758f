"""`pixart quantize` for transformers and ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..quant.stored import StoredWeight
from ..quantize.network import (
    Network,
    open_network,
    round_network,
    storage_dtype,
    weight_errors,
    write_network,
)
from ..quantize.report import Errors, mean_errors, worst_layer, write_report
from .common import console, errors, progress_bars
from .quantize_options import Request

_SHOWN = 4
_HEADINGS = {"svdquant": "SVDQuant", "round_to_nearest": "plain int4",
             "smoothing_alone": "smoothing alone", "weight": "error of the weights"}


def quantize_network(request: Request) -> None:
    """Quantise a transformer or ControlNet by any method, and say what came of it.

    Raises ValueError and CheckpointError for everything that stands in the way.
    """
    if request.method.calibrated:
        from .quantize_svdquant import quantize_calibrated

        quantize_calibrated(request)
        return
    request.refuse_calibration()
    network = open_network(request.source, request.kind, request.fields)
    dtype = storage_dtype(network, request.dtype)
    names = network.layers(request.method)
    with progress_bars(errors, hidden=True) as progress:
        task = progress.add_task("layers", total=len(names))
        stored = round_network(network, request.method, lambda _: progress.advance(task))
    found = {name: {"weight": error} for name, error in weight_errors(network, stored).items()}
    finish(request, network, stored, dtype, {"method": request.method.name}, found)


def finish(request: Request, network: Network, stored: Mapping[str, StoredWeight],
           dtype: torch.dtype, said: Mapping[str, Any], found: Errors,
           biases: Mapping[str, Tensor] | None = None) -> None:
    """Write the file and the report, print the summary."""
    size = write_network(request.target, network, stored, dtype, said, biases)
    if request.report is not None:
        write_report(request.report, {"source": network.source, **said}, found)
    if found:
        console.print(summary(found))
        name, error = worst_layer(found)
        console.print(f"largest: {error:.2%} in {name}", highlight=False, soft_wrap=True)
    left = network.left(request.method)
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        console.print(f"left as they are, for their sides do not fit {request.method.name}: "
                      f"{', '.join(left[:_SHOWN])}{more}", style="yellow", highlight=False,
                      soft_wrap=True)
    packed = sum(weight.nbytes for weight in stored.values())
    weights = sum(weight.shape.numel() for weight in stored.values())
    console.print(f"{request.target}  ({size / 2**20:,.1f} MiB; {len(stored)} layers in "
                  f"{request.method.name}, {8 * packed / weights:.3g} bits per weight; the rest in "
                  f"{str(dtype).removeprefix('torch.')})", highlight=False, soft_wrap=True)


def summary(found: Errors) -> Table:
    """Mean relative errors of each kind of layer and of all."""
    means = mean_errors(found)
    table = Table("layers", box=None, header_style="bold")
    for what in next(iter(means.values())):
        table.add_column(_HEADINGS.get(what, what), justify="right")
    for kind, values in means.items():
        table.add_row(kind, *(f"{value:.2%}" for value in values.values()))
    return table
