"""SVDQuant (arXiv 2411.05007) for one linear layer: smooth, take off a low rank, round the rest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from . import int4
from .gptq import residual_codes
from .layer import SVDQuantLayer
from .lowrank import refine
from .smooth import SMOOTH_GRID, search_smooth
from .smoothed import Branch, Calibration, Smoothed

log = logging.getLogger(__name__)

STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class SVDQuantSettings:
    """How a layer is solved; the defaults are the paper's.

    rank: of the 16-bit branch. grid: exponents (alpha, beta) of the smoothing to try besides none.
    rounds: of the refinement at most, which ends earlier where the error falls by a share of less
    than `tolerance`. gptq: the residual by GPTQ, with the one of `gptq_dampings` that is
    closest on rows held back, where that is closer than rounding to nearest; it needs about as many
    rows as the layer has inputs (the paper's damping is 0.01, meant for many rows).
    seed: of the randomised SVD. dtype: of everything stored but the codes.
    """

    rank: int = 32
    grid: tuple[tuple[float, float], ...] = SMOOTH_GRID
    rounds: int = 100
    tolerance: float = 0.0
    gptq: bool = False
    gptq_dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16


@torch.no_grad()
def solve_layer(weight: Tensor, x: Tensor, bias: Tensor | None = None, *,
                act_unsigned: bool = False,
                settings: SVDQuantSettings | None = None) -> SVDQuantLayer:
    """A linear layer weight (N, K), bias (N,) or None, in 4 bits, for inputs like x (rows, K).

    `act_unsigned` is for the layer behind a GELU. Layers that share their input are solved as one
    by stacking their weights along N: a fused query-key-value weight (3C, C) needs nothing else.
    Raises ValueError for K not a multiple of 64, shapes that do not fit together, numbers that are
    not finite or do not fit `settings.dtype`, and a rank outside 1..min(N, K).
    """
    settings = settings or SVDQuantSettings()
    calibration = calibrate(weight, x, bias, act_unsigned, settings.dtype)
    check_rank(settings.rank, weight)
    search = search_smooth(calibration, settings.rank, settings.seed, settings.grid)
    smoothed = search.smoothed
    generator = torch.Generator(weight.device).manual_seed(settings.seed)
    branch, errors = refine(smoothed, settings.rank, settings.rounds, generator,
                            settings.tolerance)
    log.debug("smoothing %s, %d rounds, output error %.4f (at first %.4f)", search.exponents,
              len(errors) - 1, min(errors), errors[0])
    codes, scales = residual_codes(smoothed, branch,
                                   settings.gptq_dampings if settings.gptq else ())
    return store(smoothed, branch, codes, scales, bias)


def solve_shared(weights: Sequence[Tensor], x: Tensor,
                 biases: Sequence[Tensor | None] | None = None, *, act_unsigned: bool = False,
                 settings: SVDQuantSettings | None = None) -> list[SVDQuantLayer]:
    """Layers with one input x (rows, K), one SVDQuantLayer for each weight (N_i, K).

    They are solved as one layer of their weights stacked along N, so that all have the same
    `smooth_factor` and the same `proj_down`. A weight that is fused already, as this network's
    qkv is, goes to `solve_layer` directly. Raises what `solve_layer` raises.
    """
    sizes = [len(weight) for weight in weights]
    biases = list(biases) if biases is not None else [None] * len(sizes)
    if not sizes or len(biases) != len(sizes):
        raise ValueError(f"{len(sizes)} weights and {len(biases)} biases given; expected at least "
                         "one weight, and a bias or None for each")
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([weight.new_zeros(len(weight)) if b is None else b
                          for weight, b in zip(weights, biases, strict=True)])
    fused = solve_layer(torch.cat(list(weights)), x, bias, act_unsigned=act_unsigned,
                        settings=settings)
    pieces = zip(fused.qweight.split(sizes), fused.weight_scale.split(sizes, dim=1),
                 fused.proj_up.split(sizes),
                 [None] * len(sizes) if fused.bias is None else fused.bias.split(sizes),
                 strict=True)
    return [dataclasses.replace(fused, qweight=qweight, weight_scale=scale.contiguous(),
                                proj_up=up, bias=piece) for qweight, scale, up, piece in pieces]


def store(smoothed: Smoothed, branch: Branch, codes: Tensor, scales: Tensor,
          bias: Tensor | None) -> SVDQuantLayer:
    """The layer as it is kept; codes (N, K) and scales (N, K/64) are those of the residual.

    Unsigned activations carry a shift into the 4-bit product alone, so that the bias gives back
    shift / smooth times the weight that the codes stand for.
    Raises ValueError where a number is too large for the dtype.
    """
    calibration = smoothed.calibration
    bias = None if bias is None else bias.float()
    if calibration.act_unsigned:
        shift = int4.scale_codes(codes, scales) @ (int4.GELU_SHIFT / smoothed.smooth)
        bias = -shift if bias is None else bias - shift
    floats = {"weight_scale": scales.T, "smooth_factor": smoothed.smooth,
              "proj_down": branch.down, "proj_up": branch.up, "bias": bias}
    stored = {name: None if value is None else value.to(calibration.dtype).contiguous()
              for name, value in floats.items()}
    for name, value in stored.items():
        if value is not None and not value.isfinite().all():
            raise ValueError(f"{name} has numbers too large for {calibration.dtype}; "
                             "choose torch.bfloat16")
    return SVDQuantLayer(qweight=int4.pack(codes), act_unsigned=calibration.act_unsigned, **stored)


def calibrate(weight: Tensor, x: Tensor, bias: Tensor | None, act_unsigned: bool,
              dtype: torch.dtype) -> Calibration:
    """A checked Calibration in float32; ValueError says what does not fit."""
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"storage dtype {dtype} given; expected one of {STORAGE_DTYPES}")
    if weight.ndim != 2 or weight.shape[1] % int4.GROUP or 0 in weight.shape:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} given; 4 bits need (outputs, "
                         f"inputs) with inputs a multiple of {int4.GROUP}")
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or len(x) == 0:
        raise ValueError(f"calibration inputs of shape {tuple(x.shape)} given for a weight of "
                         f"shape {tuple(weight.shape)}; expected (rows, {weight.shape[1]})")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} given for a weight of shape "
                         f"{tuple(weight.shape)}; expected ({len(weight)},)")
    for name, tensor in (("weight", weight), ("calibration inputs", x), ("bias", bias)):
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"the {name} given: infinite or not a number in places; a layer can "
                             "only be quantised from finite numbers")
    weight, x = weight.float(), x.float()
    return Calibration(weight, x, x @ weight.T, dtype, act_unsigned)


def check_rank(rank: int, weight: Tensor) -> None:
    """Raises ValueError for a rank that a weight (N, K) cannot have."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} given for a weight of shape {tuple(weight.shape)}; expected "
                         f"1 to {min(weight.shape)}")
