"""`pixart generate`: a prompt to a PNG, or the same picture again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import __version__
from ..model.controlnet import CONTROL_MODES
from ..png import check_png_path, read_settings, write_png
from ..settings import GRIDS, SAMPLERS, Settings
from ..text.cache import LIMIT_GB
from .common import (
    DTYPES,
    console,
    errors,
    flag,
    one_of,
    parse_fields,
    plain_errors,
    progress_bars,
)
from .loras import choose_loras, record_of
from .sources import (
    Sources,
    choose_files,
    compare_hashes,
    file_hashes,
    saved_prompt,
    with_control,
    with_embeddings,
)
from .text_options import (
    CacheFolder,
    CacheLimit,
    Precision,
    TextOptions,
    check_precision_option,
    open_cache,
)

_RECORDED = tuple(f.name for f in dataclasses.fields(Settings))


def generate(
    prompt: Annotated[str | None, typer.Argument(
        help="What to draw. May be left out with --like.")] = None,
    out: Annotated[Path | None, flag(
        "-o", "--out", help="The PNG to write. By default the first free pixart_0001.png.")] = None,
    model: Annotated[Path | None, flag(
        help="Transformer: .safetensors, .pth, or a diffusers folder. By default the small "
             "starter model that comes with this program.")] = None,
    t5: Annotated[Path | None, flag("--t5", help="T5 text encoder: a file or a folder.")] = None,
    tokenizer: Annotated[Path | None, flag(
        help="T5's spiece.model or tokenizer.json, for T5 files that bring none.")] = None,
    vae: Annotated[Path | None, flag(help="VAE: a file or a folder.")] = None,
    lcm: Annotated[bool, flag(
        "--lcm", help="Draw with the starter's few-step student.")] = False,
    steps: Annotated[int | None, flag(
        help="Sampling steps. [20; 25 with SA-Solver, 4 with LCM, 1 with DMD]")] = None,
    guidance: Annotated[float | None, flag(
        help="How closely to follow the prompt; 1 is none. [4.5; 3 with the starter model and "
             "SA-Solver, 1 with LCM and DMD]")] = None,
    seed: Annotated[int | None, flag(help="Another seed, another picture. [0]")] = None,
    width: Annotated[int | None, flag(
        help="Pixels, a multiple of 8. [the model's training size]")] = None,
    height: Annotated[int | None, flag(
        help="Pixels, a multiple of 8. [the model's training size]")] = None,
    sampler: Annotated[str | None, flag(
        help="auto, dpm (DPM-Solver++ 2M), sa-solver, lcm or dmd (one step). [auto: what the "
             "model was made for]")] = None,
    grid: Annotated[str | None, flag(
        help="Timesteps of LCM: diffusers or official. [diffusers]")] = None,
    negative: Annotated[str | None, flag(help="What to keep away from. [nothing]")] = None,
    image: Annotated[Path | None, flag(help="A picture to start from.")] = None,
    strength: Annotated[float | None, flag(
        help="How much of --image is redrawn, above 0 and at most 1. [1]")] = None,
    lora: Annotated[list[str] | None, flag(
        metavar="FILE[:STRENGTH[:ALPHA]]", help="A LoRA for the model: a file or a PEFT folder, "
        "and how strong it is. ALPHA is for PEFT files that lost their adapter_config.json. May "
        "be repeated. [1, and the alpha of the file]")] = None,
    controlnet: Annotated[Path | None, flag(
        help="A PixArt ControlNet: a file or a folder. Needs --control-image.")] = None,
    control_image: Annotated[Path | None, flag(
        help="What steers the picture: for the released ControlNets white edges on black.")] = None,
    hed: Annotated[Path | None, flag(
        help="ControlNetHED.pth: --control-image is a photo, its edges are found first.")] = None,
    control_strength: Annotated[float | None, flag(
        help="Multiplies what the ControlNet adds. [1]")] = None,
    control_mode: Annotated[str | None, flag(
        help="balanced, prompt or control (which of them matters more). [balanced]")] = None,
    control_start: Annotated[float | None, flag(
        help="The part of the schedule, 0 to 1, where control begins. [0]")] = None,
    control_end: Annotated[float | None, flag(
        help="The part of the schedule where control ends. [1]")] = None,
    control_cond_only: Annotated[bool | None, flag(
        "--control-cond-only", help="Steer the positive half of guidance only.",
        show_default=False)] = None,
    max_tokens: Annotated[int | None, flag(
        help="Caption tokens to read. [the model's own limit]")] = None,
    clean: Annotated[bool | None, flag(
        "--clean/--no-clean", help="Clean the prompt as the training captions were. [clean]",
        show_default=False)] = None,
    weights: Annotated[bool | None, flag(
        "--weights/--no-weights", help="Obey (word:1.2) in prompts. [weights]",
        show_default=False)] = None,
    embeddings: Annotated[Path | None, flag(
        help="In place of a prompt: a file of `pixart encode` or PixArt Save Embeddings.")] = None,
    negative_embeddings: Annotated[Path | None, flag(
        help="The same in place of --negative. With both files no T5 is needed.")] = None,
    device: Annotated[str, flag(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, flag(
        help="auto, float32, bfloat16 or float16. [auto: float32 on the CPU]")] = None,
    t5_precision: Precision = None,
    text_cache: CacheFolder = None,
    text_cache_limit: CacheLimit = LIMIT_GB,
    like: Annotated[Path | None, flag(
        help="Draw a picture of this program again; other options change what they name.")] = None,
    ignore_hashes: Annotated[bool, flag(
        "--ignore-hashes", help="With --like: accept other files than the picture's.")] = False,
    fields: Annotated[list[str] | None, flag(
        "--set", help="A config field of the model, such as num_heads=6. May be repeated.")] = None,
) -> None:
    """Draw a picture from a prompt.

    Without --model it draws with the small starter model (128 px, one coloured shape on a coloured
    background, guidance 3), so that it works right after installation.
    """
    with plain_errors():
        if prompt is None and like is None and embeddings is None:
            raise typer.BadParameter("a prompt is needed (or --embeddings FILE, --like PICTURE)")
        for option, text, file in (("a prompt", prompt, embeddings),
                                   ("--negative", negative, negative_embeddings)):
            if text is not None and file is not None:
                raise typer.BadParameter(f"{option} and {file.name} in its place were given; leave "
                                         "one out")
        if max_tokens is not None and embeddings is not None:
            raise typer.BadParameter("--max-tokens is for `pixart encode` where --embeddings are "
                                     "given")
        one_of("--device", device, ("auto", "cpu", "cuda"))
        if dtype is not None:
            one_of("--dtype", dtype, ("auto", *DTYPES))
        if t5_precision is not None:
            check_precision_option(t5_precision)
        cache = open_cache(text_cache, text_cache_limit)
        if sampler is not None:
            one_of("--sampler", sampler, SAMPLERS)
        if grid is not None:
            one_of("--grid", grid, GRIDS)
        if control_mode is not None:
            one_of("--control-mode", control_mode, CONTROL_MODES)
        if strength is not None and strength != 1 and image is None:
            raise typer.BadParameter("--strength needs --image")
        if ignore_hashes and like is None:
            raise typer.BadParameter("--ignore-hashes needs --like")
        recorded = read_settings(like) if like else {}
        given = {
            "prompt": prompt if embeddings is None else saved_prompt(embeddings),
            "negative_prompt": (negative if negative_embeddings is None
                                else saved_prompt(negative_embeddings)),
            "height": height, "width": width,
            "steps": steps, "guidance": guidance, "seed": seed, "sampler": sampler,
            "lcm_grid": grid, "strength": strength, "clean_caption": clean,
            "weights": weights, "max_tokens": max_tokens, "control_strength": control_strength,
            "control_mode": control_mode, "control_start": control_start,
            "control_end": control_end, "control_cond_only": control_cond_only,
        }
        settings = _settings(recorded, given)
        if settings.strength < 1 and image is None:
            raise typer.BadParameter("this picture was made from another one; pass it as --image")
        target = check_png_path(out) if out else _free_name()
        overrides = {**recorded.get("fields", {}), **parse_fields(fields)}
        sources = choose_files(model, t5, tokenizer, vae, lcm, image, recorded)
        sources = with_control(sources, controlnet, control_image, hed)
        if control_image is None and settings.names_control():
            raise typer.BadParameter(f"{', '.join(settings.names_control())} given without "
                                     "--controlnet and --control-image")
        sources = dataclasses.replace(sources, loras=choose_loras(lora, recorded))
        sources = with_embeddings(sources, embeddings, negative_embeddings)
        _check_captions(settings, sources, overrides)
        hashes = file_hashes(sources)
        if like and not ignore_hashes:
            compare_hashes(hashes, recorded.get("files"), like)
        place = _device(device, recorded.get("device"))
        text = TextOptions(t5_precision or recorded.get("t5_precision", "auto"), cache)
        _draw(settings, sources, hashes, overrides, place, _dtype(dtype, recorded, place), text,
              target)


def _settings(recorded: dict[str, Any], given: dict[str, Any]) -> Settings:
    fields = {name: recorded[name] for name in _RECORDED if name in recorded}
    if recorded:
        fields.setdefault("weights", False)  # pictures from before prompts had weights
    fields.update((name, value) for name, value in given.items() if value is not None)
    return Settings.from_dict(fields)


def _with_guidance(settings: Settings, sources: Sources) -> Settings:
    """The settings with the transformer's own guidance, where its own sampler runs and none was
    asked for."""
    if settings.guidance is None and settings.sampler in ("auto", "dpm"):
        return dataclasses.replace(settings, guidance=sources.guidance)
    return settings


def _check_captions(settings: Settings, sources: Sources, fields: dict[str, Any]) -> None:
    """Without a T5, ask for the captions that its model will want before any model is loaded."""
    if sources.text_encoder or sources.negative_embeddings is not None:
        return
    from ..captions import Captions
    from ..load import read_transformer

    config = read_transformer(sources.transformer, fields).config  # no weight is read
    settings = _with_guidance(settings, sources).resolve(config)
    Captions(None, config.caption_channels).check(settings, sources.embeddings)


def _free_name() -> Path:
    number = 1
    while (path := Path(f"pixart_{number:04d}.png")).exists():
        number += 1
    return path


def _device(wanted: str, recorded: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if wanted == "auto" and recorded == "cuda" and not available:
        errors.print("the picture was drawn with CUDA and is drawn on the CPU now: single pixels "
                     "may differ", style="yellow")
    if wanted == "auto":
        wanted = recorded if recorded == "cpu" or (recorded == "cuda" and available) else ""
    return torch.device(wanted or ("cuda" if available else "cpu"))


def _dtype(wanted: str | None, recorded: dict[str, Any], device: torch.device) -> str:
    name = wanted or recorded.get("dtype") or "auto"
    if name == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    return one_of("dtype", name, tuple(DTYPES))


def _draw(settings: Settings, sources: Sources, hashes: dict[str, Any], overrides: dict[str, Any],
          device: torch.device, dtype: str, text: TextOptions, target: Path) -> None:
    from ..pipeline import Pipeline

    if sources.starter:
        console.print("no model named: drawing with the starter model, which knows one coloured "
                      "shape on a coloured background at 128 px", style="dim", soft_wrap=True)
    with progress_bars(errors, hidden=True) as progress:
        task = progress.add_task("loading", total=None)
        pipeline = Pipeline.from_files(
            transformer=sources.transformer, t5=sources.t5, vae=sources.vae,
            tokenizer=sources.tokenizer, controlnet=sources.controlnet,
            loras=[(lora.read(), lora.strength) for lora in sources.loras],
            text_encoder=sources.text_encoder, dtype=DTYPES[dtype], device=device,
            t5_precision=text.precision, keep_t5=False, text_cache=text.cache, **overrides)
        settings = _with_guidance(settings, sources).resolve(pipeline.config)
        progress.update(task, description="drawing", total=len(settings.timesteps()))
        picture = pipeline.run(
            settings, image=sources.open_image(),
            callback=lambda step, total, _: progress.update(task, completed=step),
            control_image=sources.open_control_image(), embeddings=sources.embeddings,
            negative_embeddings=sources.negative_embeddings)[0]
    record = {**settings.as_dict(), **record_of(sources.loras),
              "fields": overrides, "dtype": dtype, "device": device.type, **text.record(),
              "files": hashes, "versions": _versions()}
    write_png(target, picture, record)
    console.print(f"{target}  ({settings.width} x {settings.height} px, {settings.steps} "
                  f"{_steps_of(settings)}, guidance {settings.guidance:g}, seed {settings.seed})",
                  highlight=False, soft_wrap=True)


def _steps_of(settings: Settings) -> str:
    name = {"dpm": "DPM-Solver++", "sa-solver": "SA-Solver"}.get(settings.sampler)
    return f"{'step' if settings.steps == 1 else 'steps'} of {name or settings.sampler.upper()}"


def _versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {"pixart": __version__, "torch": torch.__version__,
            "diffusers": diffusers.__version__, "transformers": transformers.__version__}
