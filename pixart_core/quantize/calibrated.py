"""SVDQuant from a model to its weights: what the layers see is collected, then each is solved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..captions import Captions
from ..model import Control, PixArtTransformer
from ..quant.stored import StoredWeight
from ..quant.svdquant import SVDQuantSettings
from ..settings import Settings
from ..text.embeddings import CaptionRow
from .calibrate import sampled_inputs
from .network import Network
from .report import Errors
from .solve_network import solve_network
from .trajectory import draw_all
from .work import WorkFolder


class SolvedNetwork(NamedTuple):
    """What takes the place of a network's weights and biases, and the errors of every layer."""

    stored: dict[str, StoredWeight]
    biases: dict[str, Tensor]
    errors: Errors


class CalibrationCaptions(NamedTuple):
    """Encoded captions to draw, and as many negative ones ([] without guidance)."""

    positive: Sequence[CaptionRow]
    negative: Sequence[CaptionRow]


def encode_captions(t5: Path, prompts: Sequence[str], settings: Settings, caption_channels: int, *,
                    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                    **options: Any) -> CalibrationCaptions:
    """Prompts and, with guidance, the negative prompt of `settings`, as the T5 in a file or folder
    encodes them; on the CPU, and the T5 is gone again. `options` are those of
    `T5TextEncoder.from_path`. Raises ValueError for a T5 of another width than `caption_channels`.
    """
    from ..text import T5TextEncoder

    encoder = T5TextEncoder.from_path(t5, dtype=dtype, device=device, **options)
    if encoder.caption_channels != caption_channels:
        raise ValueError(f"{t5.name} gives captions {encoder.caption_channels} wide, the model "
                         f"reads {caption_channels}; name the T5 that belongs to it")
    captions = Captions(encoder, caption_channels)
    rows = CalibrationCaptions(captions.positive(prompts, settings),
                               captions.negative(settings, len(prompts)))
    rows = CalibrationCaptions(*([row._replace(states=row.states.cpu()) for row in part]
                                 for part in rows))
    del captions, encoder
    gc.collect()
    return rows


def observed_rows(model: PixArtTransformer, watched: nn.Module, names: Sequence[str], rows: int,
                  settings: Settings, captions: CalibrationCaptions,
                  controls: Sequence[Control] = (),
                  done: Callable[[], None] | None = None) -> dict[str, Tensor]:
    """What enters each weight of `names` in `watched` while `model` draws the captions.

    `watched` is the model itself or a ControlNet among `controls`. Returns at most `rows` rows
    (rows, K) by layer name, a uniform sample over captions and timesteps; `done` is called after
    each pass through the network.
    """
    layers = [name.removesuffix(".weight") for name in names]
    with sampled_inputs(watched, layers, rows, settings.seed) as samples:
        draw_all(model, settings, captions.positive, captions.negative, controls, done)
    return {name: sample.rows() for name, sample in samples.items()}


def solve_calibrated(network: Network, names: Sequence[str], settings: SVDQuantSettings,
                     work: WorkFolder, observe: Callable[[], Mapping[str, Tensor]], *,
                     device: torch.device | str = "cpu", compare: bool = False,
                     done: Callable[[str], None] | None = None) -> SolvedNetwork:
    """Solve the weights `names`, going on with what `work` has already.

    `observe` gives the rows that each layer sees, and is called only where `work` has none yet.
    Raises what `solve_network` raises.
    """
    inputs = work.inputs()
    if inputs is None:
        work.save_inputs(observe())
        gc.collect()  # the model that was drawn with leaves before layers are solved
        inputs = work.inputs()
    solved = solve_network(network, names, inputs, settings, work, device=device, compare=compare,
                           done=done)
    return SolvedNetwork(
        {name: layer.weight for name, layer in solved.items()},
        {name.removesuffix("weight") + "bias": layer.bias
         for name, layer in solved.items() if layer.bias is not None},
        {name: layer.errors for name, layer in solved.items()})


def described(settings: SVDQuantSettings, drawn: Settings, captions: int, rows: int,
              compute: torch.dtype) -> dict[str, Any]:
    """How a file was made, for its header and for the work folder (JSON)."""
    return {"method": "svdquant", "rank": settings.rank, "gptq": settings.gptq,
            "seed": settings.seed, "rows": rows, "captions": captions, "size": drawn.height,
            "steps": drawn.steps, "guidance": drawn.guidance,
            "drawn_in": str(compute).removeprefix("torch.")}
