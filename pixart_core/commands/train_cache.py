"""`pixart train cache`: a folder of images, encoded once for many training runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table

from ..checkpoint import sha256_file
from ..config import VARIANTS
from .common import (
    DTYPES,
    console,
    device_of,
    errors,
    flag,
    one_of,
    plain_errors,
    progress_bars,
)

if TYPE_CHECKING:
    from ..training.data import CacheReport

_CONTROLS = ("none", "hed", "folder")
_SHOWN = 20


def cache(
    images: Annotated[Path, typer.Argument(
        help="Folder of images. Captions are the lines of NAME.txt beside an image, or of "
             "captions.jsonl, metadata.jsonl or parquet tables.")],
    out: Annotated[Path, typer.Argument(help="Folder of the cache; one that is there goes on.")],
    t5: Annotated[Path, flag("--t5", help="T5 text encoder: a file or a folder.")],
    vae: Annotated[Path, flag(help="The model's VAE: SD's for alpha, SDXL's for Sigma.")],
    model: Annotated[Path | None, flag(
        help="The transformer to train: variant, image size and token limit are read.")] = None,
    variant: Annotated[str | None, flag(help="alpha or sigma, without --model.")] = None,
    image_size: Annotated[int | None, flag(
        help="Pixels of a square picture; other shapes have about as many. [that of --model]")
    ] = None,
    max_tokens: Annotated[int | None, flag(
        help="Caption tokens. [those of --model, else 120 for alpha and 300 for Sigma]")] = None,
    tokenizer: Annotated[Path | None, flag(
        help="T5's spiece.model or tokenizer.json, for T5 files that bring none.")] = None,
    clean: Annotated[bool, flag(
        "--clean/--no-clean", help="Clean captions as the released models' were.")] = True,
    control: Annotated[str, flag(
        help="none, hed (edges that --hed finds) or folder (control/NAME, or the column "
             "control).")] = "none",
    hed: Annotated[Path | None, flag(help="HED edge detector for --control hed.")] = None,
    multiple: Annotated[int | None, flag(
        help="Sides are multiples of this many pixels. [the published shapes where there are "
             "some, else 32, or 16 below 256 px]")] = None,
    max_ratio: Annotated[float, flag(
        help="Longest side by shortest side of a shape, 1 to 4.")] = 4.0,
    max_upscale: Annotated[float | None, flag(
        help="Leave out pictures that would grow by more than this factor. [none]")] = None,
    dtype: Annotated[str, flag(
        help="What is stored: float16, bfloat16 or float32.")] = "float16",
    t5_dtype: Annotated[str, flag(
        help="What T5 computes in: auto, float32, bfloat16 or float16. [auto: float32 on the "
             "CPU, else bfloat16]")] = "auto",
    device: Annotated[str, flag(help="auto, cpu or cuda.")] = "auto",
    low_memory: Annotated[bool | None, flag(
        "--low-memory/--no-low-memory",
        help="T5 and VAE take turns on the device. [on for cuda]")] = None,
    batch_size: Annotated[int, flag(help="Pictures per pass of the VAE.")] = 8,
    workers: Annotated[int, flag(help="Threads that read pictures.")] = 4,
    skip_bad: Annotated[bool, flag(
        "--skip-bad", help="Go on without images that cannot be used; they are listed.")] = False,
    verify: Annotated[bool, flag(
        "--verify/--no-verify",
        help="Check every finished shard of the cache and make damaged ones again.")] = True,
) -> None:
    """Encode images and captions into a cache that `pixart train` reads.

    Run it again to add new images, to go on after a stop, or to mend a damaged cache.
    """
    with plain_errors():
        one_of("--control", control, _CONTROLS)
        one_of("--dtype", dtype, tuple(DTYPES))
        one_of("--t5-dtype", t5_dtype, ("auto", *DTYPES))
        one_of("--device", device, ("auto", "cpu", "cuda"))
        if (control == "hed") != (hed is not None):
            raise typer.BadParameter("--control hed needs --hed FILE, and --hed needs --control "
                                     "hed")
        for path in (images, t5, vae, model, tokenizer, hed):
            if path is not None and not path.exists():
                raise ValueError(f"{path} does not exist")
        place = device_of(device)
        variant, image_size, max_tokens = _target(model, variant, image_size, max_tokens)

        from ..model.hed import HEDDetector
        from ..text import T5TextEncoder
        from ..training.data import CacheSettings, build_cache
        from ..vae import load_vae

        turns = low_memory if low_memory is not None else place.type == "cuda"
        first = torch.device("cpu") if turns else place
        name = t5_dtype
        if name == "auto":
            name = "float32" if place.type == "cpu" else "bfloat16"
        settings = CacheSettings(
            variant=variant, image_size=image_size, max_tokens=max_tokens, control=control,
            dtype=dtype, clean_caption=clean, multiple=multiple, max_ratio=max_ratio,
            max_upscale=max_upscale, batch_size=batch_size, low_memory=turns, device=place,
            skip_bad=skip_bad, verify=verify, workers=workers, vae_sha256=sha256_file(vae),
            t5_sha256=sha256_file(t5), hed_sha256=None if hed is None else sha256_file(hed))
        with progress_bars(errors, hidden=True) as progress:
            tasks = {"images": progress.add_task("pictures", total=None),
                     "captions": progress.add_task("captions", total=None)}
            report = build_cache(
                images, out, settings,
                lambda: T5TextEncoder.from_path(t5, dtype=DTYPES[name], tokenizer=tokenizer,
                                                device=first),
                lambda: load_vae(vae, variant, device=first),
                None if hed is None else lambda: HEDDetector.from_path(hed, device=first),
                lambda stage, done, total: progress.update(tasks[stage], completed=done,
                                                           total=total))
        _show(report, out)


def _target(model: Path | None, variant: str | None, image_size: int | None,
            max_tokens: int | None) -> tuple[str, int, int | None]:
    """Variant, image size and token limit: what is named, else what the model says."""
    if model is not None:
        from ..load import read_transformer

        config = read_transformer(model, {} if variant is None else {"variant": variant}).config
        return config.variant, image_size or config.image_size, max_tokens or config.max_tokens
    if variant is None or image_size is None:
        raise typer.BadParameter("name the --model to train, or --variant and --image-size")
    return one_of("--variant", variant, tuple(VARIANTS)), image_size, max_tokens


def _show(report: CacheReport, out: Path) -> None:
    table = Table("bucket (height x width)", "rows", box=None, header_style="bold")
    for (height, width), rows in sorted(report.buckets.items(), key=lambda item: -item[1]):
        table.add_row(f"{height} x {width}", str(rows))
    console.print(table)
    counts = {"new": report.added, "from before": report.kept,
              "changed or removed": report.dropped, "left out": len(report.left_out),
              "smaller than their bucket": report.grown, "cut captions": report.cut}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    console.print(f"{out}  ({report.rows} rows, {report.bytes / 1e9:.3g} GB; {said})",
                  highlight=False, soft_wrap=True)
    if report.added:
        console.print(
            f"{_rate(report.added, report.image_seconds)} pictures/s, "
            f"{_rate(report.captions, report.caption_seconds)} captions/s",
            highlight=False)
    for line in report.left_out[:_SHOWN]:
        console.print(f"left out: {line}", style="yellow", highlight=False, soft_wrap=True)
    if len(report.left_out) > _SHOWN:
        console.print(f"and {len(report.left_out) - _SHOWN} more", style="yellow",
                      highlight=False)


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.3g}" if seconds > 0 else "-"
