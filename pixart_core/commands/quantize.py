"""`pixart quantize`: a model in fewer bits per weight, as ComfyUI and this program read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import read_checkpoint
from ..checkpoint.identify import explain, identify
from ..load_control import CONTROLNET_KINDS
from ..quant.policy import METHODS
from .common import DTYPES, flag, one_of, parse_fields, plain_errors
from .quantize_deepcompressor import quantize_deepcompressor
from .quantize_network import quantize_network
from .quantize_options import CalibrationOptions, Request, check_target
from .quantize_t5 import quantize_text_encoder

DEEPCOMPRESSOR = "deepcompressor"
HALF_DTYPES = ("bfloat16", "float16")

# what reads each kind of model; the functions check the request before they load anything
QUANTIZERS: dict[str, Callable[[Request], None]] = {
    "pixart": quantize_network, "pixart-diffusers": quantize_network,
    **dict.fromkeys(CONTROLNET_KINDS, quantize_network), "t5": quantize_text_encoder,
}


def quantize(
    source: Annotated[Path, typer.Argument(
        metavar="IN", help="A file or diffusers folder in 16 or 32 bits; with --from "
                           "deepcompressor, the folder that it wrote.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file.")],
    method: Annotated[str | None, flag(
        "--method", help=f"{', '.join(METHODS)}. svdquant (4 bits, the closest) needs calibration; "
                         "the others round each weight by itself.")] = None,
    dtype: Annotated[str, flag(
        help="Of what is not quantised: auto, bfloat16 or float16. [auto: that of IN, bfloat16 "
             "for one in 32 bits]")] = "auto",
    fields: Annotated[list[str] | None, flag(
        "--set", help="A config field that the file does not tell, such as num_heads=6.")] = None,
    report: Annotated[Path | None, flag(
        help="A .json file for the error of every layer; with svdquant beside those of plain "
             "rounding and of smoothing alone.")] = None,
    origin: Annotated[str | None, flag(
        "--from", help="deepcompressor: IN is a folder with its model.pt, scale.pt, smooth.pt and "
                       "branch.pt.")] = None,
    t5: Annotated[Path | None, flag(
        "--t5", help="svdquant: T5 that encodes the prompts, a file or a folder. It leaves memory "
                     "before the model comes.")] = None,
    tokenizer: Annotated[Path | None, flag(
        help="T5's spiece.model or tokenizer.json, for T5 files that bring none.")] = None,
    t5_precision: Annotated[str | None, flag(
        help="What the matrices of T5 are kept in: bf16, fp16, fp8, int8 or int4. [as in its "
             "file, float32 on the CPU]")] = None,
    prompts: Annotated[Path | None, flag(
        help="svdquant: a text file, one prompt a line. [128 that come with this program]")] = None,
    embeddings: Annotated[list[Path] | None, flag(
        help="svdquant: prompts of `pixart encode`, in place of --t5; may be repeated.")] = None,
    negative_embeddings: Annotated[Path | None, flag(
        help="With --embeddings and guidance: the encoded empty prompt.")] = None,
    count: Annotated[int | None, flag(
        help="svdquant: prompts to draw, spread over all. [4 on the CPU, 32 on CUDA; every one of "
             "--embeddings]")] = None,
    size: Annotated[int | None, flag(
        help="svdquant: pixels of the square pictures. [that of the model, at most 192 on the "
             "CPU and 1024 on CUDA]")] = None,
    steps: Annotated[int | None, flag(help="svdquant: steps of the sampler. [20; LCM 4]")] = None,
    guidance: Annotated[float | None, flag(
        help="svdquant: guidance of the sampler. [4.5; LCM 1]")] = None,
    rank: Annotated[int | None, flag(
        help="svdquant: of the 16-bit branch, a multiple of 16. [32]")] = None,
    rows: Annotated[int | None, flag(
        help="svdquant: inputs kept of each layer; one in five is only measured on. [640]")] = None,
    gptq: Annotated[bool | None, flag(
        "--gptq/--no-gptq", help="svdquant: make up for rounding errors column by column; slower, "
                                 "wants --rows 4096 or more. [no]")] = None,
    seed: Annotated[int | None, flag(help="svdquant: of noise, sample and SVD. [0]")] = None,
    device: Annotated[str | None, flag(
        help="svdquant: auto, cpu or cuda. [auto]")] = None,
    calibration_dtype: Annotated[str | None, flag(
        help="svdquant: what the model draws in. [float32 on the CPU, or bfloat16 where it has "
             "instructions for that; bfloat16 on CUDA]")] = None,
    base: Annotated[Path | None, flag(
        help="svdquant of a ControlNet: the transformer it steers. deepcompressor: the original "
             "transformer, for config and null caption.")] = None,
    control_images: Annotated[Path | None, flag(
        help="svdquant of a ControlNet: a folder of control images, taken in turn.")] = None,
    hed: Annotated[Path | None, flag(
        help="HED network: the control images are its edges of these pictures.")] = None,
    vae: Annotated[Path | None, flag(help="svdquant of a ControlNet: the model's VAE.")] = None,
) -> None:
    """Quantise a PixArt transformer, ControlNet or T5 text encoder (int8, fp8 or int4).

    int8, fp8, mxfp8 and nvfp4 are ComfyUI's own formats, which its stock loader reads too. With
    svdquant the model draws some prompts first; the solved layers are kept in OUT.work, from
    where the same command goes on after a stop.
    """
    with plain_errors():
        one_of("--dtype", dtype, ("auto", *HALF_DTYPES))
        calibration = CalibrationOptions(
            t5, tokenizer, t5_precision, prompts, embeddings or None, negative_embeddings, count,
            size, steps, guidance, rank, rows, gptq, seed, device, calibration_dtype, base,
            control_images, hed, vae)
        if origin is not None:
            one_of("--from", origin, (DEEPCOMPRESSOR,))
            method = method or "svdquant"
            if method != "svdquant":
                raise typer.BadParameter("--from deepcompressor gives svdquant; leave out --method")
        if method is None:
            raise typer.BadParameter(f"--method is missing; use one of {', '.join(METHODS)}")
        one_of("--method", method, tuple(METHODS))
        check_target(source, target, report)
        request = Request(source, target, "", METHODS[method], DTYPES.get(dtype),
                          parse_fields(fields), report, calibration)
        if origin is not None:
            quantize_deepcompressor(request)
            return
        kind, run = _quantizer(source)
        run(dataclasses.replace(request, kind=kind))


def _quantizer(source: Path) -> tuple[str, Callable[[Request], None]]:
    """The kind of model in `source` and what quantises it; ValueError for other kinds."""
    inner = "controlnet" if (source / "controlnet").is_dir() else None
    tensors = read_checkpoint(source, subfolder=inner, keep_packed=True).state_dict
    kind = identify(tensors)
    if kind not in QUANTIZERS:
        raise ValueError(f"{source.name} {explain(tensors)}. It cannot be quantised here")
    return kind, QUANTIZERS[kind]
