"""`pixart convert`: PixArt models from any file to a safetensors or GGUF file, or a folder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..checkpoint import (
    CheckpointError,
    convert_state_dict,
    detect_config,
    read_checkpoint,
    write_checkpoint,
)
from ..checkpoint.identify import identify, require_kind
from ..config import METADATA_KEY, PixArtConfig
from ..export import write_diffusers_folder
from ..load import open_transformer
from ..load_control import CONTROLNET_KINDS
from .common import DTYPES, console, flag, one_of, parse_fields, plain_errors
from .convert_control import write_control, write_hed
from .convert_gguf import (
    DEFAULT_QUANT,
    NOT_FOR_GGUF,
    QUANTS,
    check_quant,
    write_text_encoder,
    write_transformer,
)
from .convert_lora import write_lora

TRANSFORMER_KINDS = ("pixart", "pixart-diffusers")


def convert(
    source: Annotated[Path, typer.Argument(
        metavar="IN", help="A .pth, .safetensors or .gguf file, or a diffusers folder.")],
    target: Annotated[Path, typer.Argument(
        metavar="OUT", help="A .safetensors or .gguf file, or a folder for diffusers.")],
    to: Annotated[str | None, flag(
        help="Tensor names, native or diffusers, or gguf for a .gguf OUT. [native for a file, "
             "diffusers for a folder]",
    )] = None,
    dtype: Annotated[str, flag(
        help="auto (as it is), float32, bfloat16 or float16.")] = "auto",
    ema: Annotated[bool, flag(
        "--ema", help="Take the averaged weights of a training file.")] = False,
    fields: Annotated[list[str] | None, flag(
        "--set", help="A config field that the file does not tell, such as num_heads=6.")] = None,
    base: Annotated[Path | None, flag(
        help="For an original ControlNet: a transformer to compare the base in it with. For a "
             "LoRA with DoRA: the transformer that it will be used with.")] = None,
    lora: Annotated[bool, flag(
        "--lora", help="IN is a LoRA of any layout, OUT a file for ComfyUI's own LoRA nodes.",
    )] = False,
    alpha: Annotated[float | None, flag(
        help="With --lora: alpha of a PEFT file that lost its adapter_config.json (8 in PixArt's "
             "own training scripts); it counts instead of what the file says.")] = None,
    quant: Annotated[str | None, flag(
        help=f"For a .gguf OUT: {', '.join(QUANTS)}. [{DEFAULT_QUANT}]")] = None,
    tokenizer: Annotated[Path | None, flag(
        help="For a T5 that brings none, and a .gguf OUT: T5's spiece.model, to be kept inside.",
    )] = None,
) -> None:
    """Convert a PixArt transformer, ControlNet, HED network or, with --lora, LoRA.

    A T5 text encoder becomes a .gguf OUT.

    The config is written into the result. Of a ControlNet file that carries a whole base model,
    the ControlNet alone is kept.
    """
    with plain_errors():
        if to is not None:
            one_of("--to", to, ("native", "diffusers", "gguf"))
        if lora and (to or ema or tokenizer):
            raise typer.BadParameter("--to, --ema and --tokenizer are for models, not for --lora")
        if alpha is not None and not lora:
            raise typer.BadParameter("--alpha is for --lora")
        one_of("--dtype", dtype, ("auto", *DTYPES))
        quant = check_quant(source, target, quant, to)
        to = None if to == "gguf" else to  # said twice: OUT ends in .gguf
        folder = target.is_dir() or target.suffix == ""
        if folder and to == "native":
            raise typer.BadParameter("a folder is diffusers' form; for native names let OUT end "
                                     "in .safetensors")
        if target.exists() and target.resolve() == source.resolve():
            raise typer.BadParameter("OUT is IN; write to another file")
        names, to = to, to or ("diffusers" if folder else "native")
        cast = functools.partial(_cast, dtype=dtype)
        if lora and quant:
            raise typer.BadParameter(NOT_FOR_GGUF.format(source.name))
        if lora:
            _say(*write_lora(source, target, cast, base, parse_fields(fields), alpha), target)
            return
        kind = _kind(source)
        if base is not None and kind not in CONTROLNET_KINDS:
            raise typer.BadParameter(f"--base is for ControlNets; {source.name} is none")
        if ema and kind not in TRANSFORMER_KINDS:
            raise typer.BadParameter(f"--ema is for transformers; {source.name} is none")
        if quant and kind not in (*TRANSFORMER_KINDS, "t5"):
            raise typer.BadParameter(NOT_FOR_GGUF.format(source.name))
        if tokenizer is not None and not (quant and kind == "t5"):
            raise typer.BadParameter("--tokenizer is for a T5 encoder and a .gguf OUT")
        if kind == "t5" and quant:
            if fields or names:
                raise typer.BadParameter("--set and --to are for PixArt models, not for a T5")
            count, said = write_text_encoder(source, target, quant, DTYPES.get(dtype), tokenizer)
            for line in said:
                console.print(line, highlight=False, soft_wrap=True)
            to = "llama.cpp's"
        elif kind in CONTROLNET_KINDS:
            count, said = write_control(source, target, to, cast, base, parse_fields(fields),
                                        folder)
            for line in said:
                console.print(line, highlight=False, soft_wrap=True)
        elif kind == "hed":
            if folder or to == "diffusers" or fields:
                raise typer.BadParameter("a HED network has one layout and no fields; let OUT end "
                                         "in .safetensors")
            count = write_hed(source, target, cast)
        else:
            weights, config = _open(source, ema, parse_fields(fields))
            tensors = cast(convert_state_dict(weights, to=to))
            if folder:
                write_diffusers_folder(target, tensors, config)
            elif quant:
                console.print(write_transformer(target, tensors, config, quant), highlight=False,
                              soft_wrap=True)
            else:
                write_checkpoint(target, tensors,
                                 {METADATA_KEY: config.to_json(), "format": "pt"})
            count = sum(t.numel() for t in tensors.values())
        console.print(f"{target}  ({count:,} parameters, {to} names)", highlight=False,
                      soft_wrap=True)


def _say(count: int, notes: list[str], target: Path) -> None:
    """What was written of a LoRA, after what was not used of it."""
    for note in notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    console.print(f"{target}  ({count:,} parameters, for ComfyUI's LoRA loaders)",
                  highlight=False, soft_wrap=True)


def _kind(source: Path) -> str:
    inner = "controlnet" if (source / "controlnet").is_dir() else None
    return identify(read_checkpoint(source, subfolder=inner, keep_packed=True).state_dict)


def _open(source: Path, ema: bool, fields: dict[str, Any],
          ) -> tuple[dict[str, Tensor], PixArtConfig]:
    """Checked weights under native names, and their config."""
    checkpoint = read_checkpoint(source, prefer_ema=ema)
    require_kind(checkpoint.state_dict, TRANSFORMER_KINDS, source.name)
    if ema and not _has_ema(source):
        raise CheckpointError(f"{source.name} has no averaged weights (state_dict_ema); leave out "
                              "--ema")
    config = detect_config(checkpoint.state_dict, checkpoint.metadata, config=checkpoint.config,
                           pipeline_class=checkpoint.pipeline_class, **fields)
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return open_transformer(checkpoint.state_dict, **known)


def _has_ema(source: Path) -> bool:
    if source.is_dir() or source.suffix == ".safetensors":
        return False
    loaded = torch.load(source, map_location="meta", weights_only=True)
    return isinstance(loaded, dict) and "state_dict_ema" in loaded


def _cast(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype == "auto":
        return tensors
    wanted = DTYPES[dtype]
    return {name: tensor.to(wanted) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}
