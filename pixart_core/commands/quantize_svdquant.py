"""`pixart quantize --method svdquant`: draw, collect, solve layer by layer, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from .. import __version__
from ..checkpoint import sha256_file
from ..config import ControlNetConfig
from ..load import read_transformer
from ..model import Control
from ..model.controlnet import check_fit
from ..quant.svdquant import SVDQuantSettings
from ..quant.svdquant.layer import RANK_MULTIPLE
from ..quantize.calibrated import described, observed_rows, solve_calibrated
from ..quantize.network import Network, open_network, storage_dtype
from ..quantize.work import WorkFolder
from .common import DTYPES, device_of, errors, one_of, progress_bars
from .quantize_captions import CaptionSource, choose_captions
from .quantize_control import check_control, control_latents
from .quantize_network import finish
from .quantize_options import CalibrationOptions, Request

DEFAULT_RANK, DEFAULT_ROWS = 32, 640
_COUNT = {"cpu": 4, "cuda": 32}
_LARGEST = {"cpu": 192, "cuda": 1024}  # pixels


def quantize_calibrated(request: Request) -> None:
    """SVDQuant of a transformer or ControlNet.

    Raises ValueError and CheckpointError for everything that stands in the way, before any model
    is loaded where that can be.
    """
    options = request.calibration
    options.require_files()
    rows = _positive("--rows", options.rows, DEFAULT_ROWS)
    place = device_of(one_of("--device", options.device or "auto", ("auto", "cpu", "cuda")))
    compute = _compute_dtype(options, place)
    network = open_network(request.source, request.kind, request.fields)
    check_control(options, network)
    names = network.layers(request.method)
    dtype = storage_dtype(network, request.dtype)
    solver = _solver(options, dtype)
    config = network.config
    if isinstance(config, ControlNetConfig):
        config = read_transformer(options.base, {}).config
        check_fit(network.config, config)
    size = options.size or min(config.image_size, _LARGEST[place.type])
    captions = choose_captions(options, config, size, _COUNT[place.type])
    said = described(solver, captions.settings, captions.count, rows, compute)
    work = WorkFolder(request.target)
    compare = request.report is not None
    resumed = work.begin({
        "version": __version__, "input": sha256_file(request.source),
        "fields": request.fields, **said, "dtype": str(dtype), "compare": compare,
        **captions.fingerprint(), **_fingerprint(options)})
    if resumed:
        errors.print(f"going on with {work.path}", highlight=False, soft_wrap=True)
    with _kept(work), progress_bars(errors, hidden=True) as progress:
        drawing = progress.add_task("calibration", total=captions.passes(), visible=False)
        solving = progress.add_task("layers", total=len(names))

        def observe() -> dict[str, Tensor]:
            progress.update(drawing, visible=True)
            return _observe(request, network, captions, names, rows, compute, place,
                            lambda: progress.advance(drawing))

        solved = solve_calibrated(network, names, solver, work, observe, device=place,
                                  compare=compare, done=lambda _: progress.advance(solving))
    finish(request, network, solved.stored, dtype, said, solved.errors, solved.biases)
    work.finish()


def _observe(request: Request, network: Network, captions: CaptionSource,
             names: list[str], rows: int, compute: torch.dtype, place: torch.device,
             done: Callable[[], None]) -> dict[str, Tensor]:
    """What enters each layer while the captions are drawn, (rows, K) by layer name."""
    from ..load import load_transformer
    from ..load_control import load_controlnet

    options = request.calibration
    encoded = captions.encoded(place)
    controls: list[Control] = []
    if network.is_controlnet:
        model = load_transformer(options.base, dtype=compute, device=place)
        watched = load_controlnet(request.source, dtype=compute, device=place, base=model.config,
                                  **request.fields)
        controls = [Control(watched, latent)
                    for latent in control_latents(options, captions.settings, place)]
    else:
        model = watched = load_transformer(request.source, dtype=compute, device=place,
                                           **request.fields)
    return observed_rows(model, watched, names, rows, captions.settings, encoded, controls, done)


@contextmanager
def _kept(work: WorkFolder) -> Iterator[None]:
    """Say what Ctrl-C leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"stopped; the same command goes on with {work.path}", highlight=False,
                     soft_wrap=True)
        raise


def _solver(options: CalibrationOptions, dtype: torch.dtype) -> SVDQuantSettings:
    rank = _positive("--rank", options.rank, DEFAULT_RANK)
    if rank % RANK_MULTIPLE:
        raise typer.BadParameter(f"--rank is {rank}; kernels take multiples of {RANK_MULTIPLE}")
    return SVDQuantSettings(rank=rank, gptq=bool(options.gptq), seed=options.seed or 0,
                            dtype=dtype)


def _fingerprint(options: CalibrationOptions) -> dict[str, Any]:
    """What else the result depends on."""
    paths: dict[str, Path | None] = {"base": options.base, "hed": options.hed, "vae": options.vae,
                                     "control_images": options.control_images}
    return {name: sha256_file(path) for name, path in paths.items() if path is not None}


def _compute_dtype(options: CalibrationOptions, place: torch.device) -> torch.dtype:
    """What the calibration computes in: bfloat16 where the hardware is faster with it."""
    if options.calibration_dtype is not None:
        return DTYPES[one_of("--calibration-dtype", options.calibration_dtype, tuple(DTYPES))]
    return torch.bfloat16 if place.type == "cuda" or _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by itself; PyTorch is slower with it than with float32
    where it does not."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _positive(option: str, given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise typer.BadParameter(f"{option} is {given}; use 1 or more")
    return given or default
