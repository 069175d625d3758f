"""SVDQuant for a whole network, layer by layer, with the errors of what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.mapped import release_pages
from ..quant.policy import behind_gelu
from ..quant.stored import StoredWeight
from ..quant.svdquant import (
    SVDQuantLayer,
    SVDQuantSettings,
    output_error,
    round_to_nearest,
    smooth_only,
    solve_layer,
)
from ..quant.svdquant_format import SVDQuant
from .network import Network
from .work import SolvedLayer, WorkFolder

OURS, NEAREST, SMOOTHED = "svdquant", "round_to_nearest", "smoothing_alone"
HELD_BACK = 5  # one row in so many is only measured on


def stored_layer(layer: SVDQuantLayer) -> StoredWeight:
    """A solved layer as comfy-kitchen stores its weight; the bias stays where it is."""
    return SVDQuant.from_layer(layer.qweight, layer.weight_scale, layer.smooth_factor,
                               layer.proj_down, layer.proj_up, layer.act_unsigned)


def solve_weight(weight: Tensor, bias: Tensor | None, rows: Tensor, settings: SVDQuantSettings, *,
                 act_unsigned: bool = False, compare: bool = False) -> SolvedLayer:
    """A weight (N, K) for inputs like `rows` (M, K), on the CPU, and its relative output errors.

    One row in five is held back to measure on: SVDQuant, plain rounding of weights and
    activations, and with `compare` the best smoothing without a branch, which takes about a third
    longer. Raises what `solve_layer` raises.
    """
    others = torch.arange(len(rows), device=rows.device) % HELD_BACK == HELD_BACK - 1
    fitted, measured = (rows[~others], rows[others]) if others.any() else (rows, rows)
    dtype = settings.dtype
    layer = solve_layer(weight, fitted, bias, act_unsigned=act_unsigned, settings=settings)
    candidates = {OURS: layer, NEAREST: round_to_nearest(weight, bias, act_unsigned=act_unsigned,
                                                         dtype=dtype)}
    if compare:
        candidates[SMOOTHED] = smooth_only(weight, fitted, bias, act_unsigned=act_unsigned,
                                           dtype=dtype)
    errors = {name: output_error(weight, bias, one, measured)
              for name, one in candidates.items()}
    new_bias = None if layer.bias is None else layer.bias.cpu()
    return SolvedLayer(stored_layer(layer).to("cpu"), new_bias, errors)


def solve_network(network: Network, names: Sequence[str], inputs: Mapping[str, Tensor],
                  settings: SVDQuantSettings, work: WorkFolder, *,
                  device: torch.device | str = "cpu", compare: bool = False,
                  done: Callable[[str], None] | None = None) -> dict[str, SolvedLayer]:
    """Solve the weights `names` of a network for `inputs`, rows by layer name, on `device`.

    What `work` has already is taken from there, every further layer is kept there, and one at a
    time is in memory in float32. `done` is told each name. Raises ValueError that names the layer
    that cannot be solved.
    """
    for name in names:
        if not work.has_layer(name):
            layer = name.removesuffix(".weight")
            weight, bias = (network.state_dict.get(f"{layer}.{leaf}")
                            for leaf in ("weight", "bias"))
            try:
                solved = solve_weight(
                    weight.to(device).float(), None if bias is None else bias.to(device).float(),
                    inputs[layer].to(device).float(), settings, act_unsigned=behind_gelu(name),
                    compare=compare)
            except ValueError as error:
                raise ValueError(f"{name} of {network.source}: {error}") from error
            work.save_layer(name, solved)
            release_pages([inputs[layer], *([weight] if network.mapped else [])])
        if done is not None:
            done(name)
    return {name: work.layer(name) for name in names}
