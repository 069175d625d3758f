"""`pixart encode`: a prompt to a file, from which pictures are drawn without T5."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..starter import find_starter
from .common import DTYPES, console, device_of, flag, one_of, plain_errors
from .text_options import Precision, check_precision_option

_MAX_TOKENS = 300


def encode(
    prompt: Annotated[str, typer.Argument(
        help='What to draw, or "" for the negative caption of guidance.')],
    out: Annotated[Path, flag("-o", "--out", help="The .safetensors file to write.")],
    t5: Annotated[Path | None, flag(
        "--t5", help="T5 text encoder: a file or a folder. By default the small starter T5 that "
                     "comes with this program.")] = None,
    tokenizer: Annotated[Path | None, flag(
        help="T5's spiece.model or tokenizer.json, for T5 files that bring none.")] = None,
    model: Annotated[Path | None, flag(
        help="The transformer the prompt is for: its token limit is read.")] = None,
    max_tokens: Annotated[int | None, flag(
        help="Caption tokens to read. [those of --model or of the starter model, else 300; alpha "
             "and delta read 120]")] = None,
    clean: Annotated[bool, flag(
        "--clean/--no-clean", help="Clean the prompt as the training captions were.")] = True,
    weights: Annotated[bool, flag(
        "--weights/--no-weights", help="Obey (word:1.2) in the prompt.")] = True,
    device: Annotated[str, flag(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, flag(
        help="auto, float32, bfloat16 or float16. [auto: float32 on the CPU]")] = "auto",
    t5_precision: Precision = "auto",
) -> None:
    """Encode a prompt into a file for `pixart generate --embeddings` and ComfyUI."""
    with plain_errors():
        one_of("--device", device, ("auto", "cpu", "cuda"))
        one_of("--dtype", dtype, ("auto", *DTYPES))
        check_precision_option(t5_precision)
        if max_tokens is not None and max_tokens < 1:
            raise typer.BadParameter(f"--max-tokens is {max_tokens}; use 1 or more")
        if out.suffix.lower() != ".safetensors":
            raise typer.BadParameter(f"{out} does not end in .safetensors")
        if not out.parent.is_dir():
            raise ValueError(f"the folder {out.parent} does not exist")
        if tokenizer is not None and t5 is None:
            raise typer.BadParameter("--tokenizer needs --t5")
        t5, model = _files(t5, tokenizer, model)
        place = device_of(device)
        name = ("float32" if place.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
        limit = max_tokens or _limit(model)

        from ..text import T5TextEncoder
        from ..text.embeddings import CaptionEntry, save_embeddings

        encoder = T5TextEncoder.from_path(t5, dtype=DTYPES[name], tokenizer=tokenizer,
                                          device=place, precision=t5_precision)
        states = encoder.states(prompt, limit, clean, weights)
        info = {"prompt": prompt, "encoder": t5.name, "clean_caption": clean, "weights": weights,
                "max_tokens": limit}
        save_embeddings(out, [CaptionEntry(states[None].cpu())], info)
        console.print(f"{out}  ({len(states)} of {limit} tokens, {states.shape[1]} wide, {name})",
                      highlight=False, soft_wrap=True)


def _files(t5: Path | None, tokenizer: Path | None, model: Path | None
           ) -> tuple[Path, Path | None]:
    """The T5 and the transformer named, or those of the starter family."""
    for path in (t5, tokenizer, model):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist")
    if t5 is not None:
        return t5, model
    starter = find_starter()
    if starter is None:
        raise ValueError("no --t5 was given and the starter models are not in this installation; "
                         "name a T5 with --t5")
    return starter.t5_file, model or starter.transformer


def _limit(model: Path | None) -> int:
    if model is None:
        return _MAX_TOKENS
    from ..load import read_transformer

    return read_transformer(model, {}).config.max_tokens
