"""`pixart train evaluate`: what share of a model's pictures shows what was asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..png import check_png_path
from ..settings import SAMPLERS
from ..whole import whole_file
from .common import (
    DTYPES,
    console,
    device_of,
    errors,
    flag,
    listed,
    one_of,
    parse_fields,
    plain_errors,
    progress_bars,
)

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..training.evaluate import ControlRow, DrawSettings, Prompt, Report
    from ..training.scenes import SceneSettings

_KINDS = ("one", "two", "counts")


def evaluate(
    transformer: Annotated[Path | None, flag(
        "--transformer", "--model", help="Transformer to evaluate; without one the judge alone is "
        "measured.")] = None,
    t5: Annotated[Path | None, flag("--t5", help="T5 text encoder: a file or a folder.")] = None,
    vae: Annotated[Path | None, flag(help="VAE: a file or a folder.")] = None,
    tokenizer: Annotated[Path | None, flag(
        help="T5's spiece.model or tokenizer.json, for T5 files that bring none.")] = None,
    controlnet: Annotated[Path | None, flag(
        help="ControlNet to evaluate beside it, on the outlines of the scenes.")] = None,
    hed: Annotated[Path | None, flag(
        help="HED edge detector: hints are what it finds in the renders. [exact outlines]")] = None,
    strengths: Annotated[str, flag(
        help="Control strengths to try; 0 is without.")] = "0,0.25,0.5,0.75,1,1.5,2",
    prompts: Annotated[int, flag(help="Held-out prompts.")] = 128,
    kinds: Annotated[str, flag(
        help="What the prompts are of, in equal shares: one, two, counts.")] = "one",
    named: Annotated[str | None, flag(
        help="Attributes that the prompts name beside shapes and their count, such as "
             "background,color. Only what is named is scored. [all]")] = None,
    image_size: Annotated[int | None, flag(
        help="Pixels of a square picture. [the model's training size, 128 without one]")] = None,
    ratios: Annotated[str, flag(help="Width to height, from 1:2 to 2:1: 1:1,5:3,3:5.")] = "1:1",
    corners: Annotated[float, flag(
        help="Share of the one-object scenes with the object in a corner.")] = 0.0,
    spread: Annotated[float, flag(
        help="How far places and sizes of renders and control hints stray from their middles, 0 "
             "to 1, as in the scenes the model was trained on.")] = 1.0,
    grid: Annotated[bool, flag(
        "--grid", help="Round places of single objects to the model's tokens in renders and hints, "
                       "as in the scenes the model was trained on.")] = False,
    steps: Annotated[int | None, flag(help="Sampling steps. [the sampler's own]")] = None,
    guidance: Annotated[float | None, flag(help="1 is none. [the sampler's own]")] = None,
    sampler: Annotated[str, flag(help="auto, dpm, sa-solver, lcm or dmd.")] = "auto",
    seed: Annotated[int, flag(help="Of the noise.")] = 0,
    scene_seed: Annotated[int, flag(help="Of the prompts.")] = 1000,
    batch_size: Annotated[int, flag(help="Pictures at a time.")] = 32,
    judged: Annotated[int, flag(
        "--judge", help="True renders to measure the judge itself on; 0 for none.")] = 512,
    out: Annotated[Path | None, flag("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, flag(
        help="Draw edge F-score and prompt accuracy over the strengths into this PNG, and write "
             "its numbers to a .csv beside it.")] = None,
    device: Annotated[str, flag(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, flag(
        help="auto, float32, bfloat16 or float16. [auto: float32 on the CPU]")] = "auto",
    fields: Annotated[list[str] | None, flag(
        "--set", help="A config field of the model, such as num_heads=6. May be repeated.")] = None,
) -> None:
    """Measure a model on held-out scenes: what share of the pictures shows what was asked for.

    Shares come with their standard error. Beside the model's stand the judge's own, on renders
    that are true, and those of renders that went through the VAE, which no model can beat.
    """
    with plain_errors():
        one_of("--device", device, ("auto", "cpu", "cuda"))
        one_of("--dtype", dtype, ("auto", *DTYPES))
        one_of("--sampler", sampler, SAMPLERS)
        for kind in listed(kinds):
            one_of("--kinds", kind, _KINDS)
        if transformer is None and (t5 or vae or tokenizer or controlnet or hed or named):
            raise typer.BadParameter("--t5, --vae, --tokenizer, --controlnet, --hed and --named "
                                     "need --transformer")
        if hed is not None and controlnet is None:
            raise typer.BadParameter("--hed needs --controlnet")
        if transformer is None and not judged:
            raise typer.BadParameter("nothing to do; name a --transformer, or leave --judge")
        for name, value, least in (("--prompts", prompts, 1), ("--judge", judged, 0)):
            if value < least:
                raise typer.BadParameter(f"{name} is {value}; use {least} or more")
        for path in (transformer, t5, vae, tokenizer, controlnet, hed):
            if path is not None and not path.exists():
                raise ValueError(f"{path} does not exist")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"the folder {out.parent} does not exist")
        steered = [_strength(value) for value in listed(strengths)]
        if plot is not None:
            _check_plot(plot, controlnet, steered)

        from ..training.evaluate import DrawSettings, held_out_prompts
        from ..training.scenes import ATTRIBUTES, SceneSettings

        attributes = None if named is None else listed(named)
        for name in attributes or ():
            one_of("--named", name, ATTRIBUTES)
        pipeline = None
        draw = DrawSettings(steps, guidance, sampler, seed, batch_size)
        if transformer is not None:
            from ..pipeline import Pipeline

            place = device_of(device)
            pipeline = Pipeline.from_files(
                transformer, t5, vae, None if dtype == "auto" else DTYPES[dtype], place, tokenizer,
                controlnet, **parse_fields(fields))
            image_size = image_size or pipeline.config.image_size
        chosen = listed(kinds)
        shares = {name: chosen.count(name) / len(chosen) for name in _KINDS}
        drawn = SceneSettings(image_size or 128, listed(ratios), shares["two"], shares["counts"],
                              corners, spread, grid)
        result: dict[str, Any] = {"image_size": drawn.image_size, "ratios": drawn.ratios,
                                  "kinds": chosen, "corners": corners, "spread": spread,
                                  "grid": grid, "scene_seed": scene_seed, "named": attributes}
        if judged:
            result["judge"] = _judge(judged, drawn, scene_seed)
        if pipeline is not None:
            result["draw"] = vars(draw)
            asked = held_out_prompts(prompts, scene_seed, drawn, attributes)
            result |= _model(pipeline, asked, draw)
            if controlnet is not None:
                asked = held_out_prompts(prompts, scene_seed, drawn, ("background", "color"))
                result |= _control(pipeline, asked, draw, steered, hed, plot)
        if out is not None:
            with whole_file(out) as temporary:
                temporary.write_text(json.dumps(result, indent=2), encoding="utf-8")


def _judge(count: int, drawn: SceneSettings, seed: int) -> dict[str, Any]:
    from ..training.evaluate import held_out_prompts, judge_rates

    rates = judge_rates([p.scene for p in held_out_prompts(count, seed + 1, drawn)])
    _table(f"the judge on {count} true renders, % right", rates)
    return {name: report.to_dict() for name, report in rates.items()}


def _model(pipeline: Pipeline, prompts: list[Prompt], draw: DrawSettings) -> dict[str, Any]:
    from ..training.evaluate import ceiling, evaluate

    count = len(prompts)
    reports = {"renders through the VAE": ceiling(pipeline.vae, prompts, draw.batch_size)}
    with progress_bars(errors, hidden=True) as progress:
        task = progress.add_task("drawing", total=count)
        reports["model"] = evaluate(pipeline, prompts, draw,
                                    lambda done, total: progress.update(task, completed=done))
    _table(f"{count} held-out prompts, % right", reports)
    return {"ceiling": reports["renders through the VAE"].to_dict(),
            "model": reports["model"].to_dict()}


def _control(pipeline: Pipeline, prompts: list[Prompt], draw: DrawSettings, strengths: list[float],
             hed: Path | None, plot: Path | None) -> dict[str, Any]:
    from ..model.hed import HEDDetector
    from ..training.evaluate import control_limits, evaluate_control

    count = len(prompts)
    limits = control_limits(pipeline.vae, prompts, draw.batch_size)
    detector = None if hed is None else HEDDetector.from_path(hed)
    with progress_bars(errors, hidden=True) as progress:
        task = progress.add_task("drawing with control", total=count * len(strengths))
        rows: list[ControlRow] = []
        for strength in strengths:
            rows += evaluate_control(pipeline, prompts, draw, [strength], detector)
            progress.advance(task, count)
    table = Table("control", "edge F1", "precision", "recall", "colour", "background", "all",
                  title=f"{count} outlines, prompts without size and place", box=None,
                  header_style="bold")
    named = {f"{row.strength:g}" if row.strength else "none": row for row in rows}
    for name, row in (limits | named).items():
        words = row.report.rows["all"]
        table.add_row(name, f"{row.f1:.3f} ± {row.f1_error:.3f}", f"{row.precision:.3f}",
                      f"{row.recall:.3f}", str(words["color"]), str(words["background"]),
                      str(words["all"]))
    console.print(table)
    if plot is not None:
        _plot(plot, rows, limits)
    return {"control": [row.to_dict() for row in rows],
            "control_limits": {name: row.to_dict() for name, row in limits.items()}}


def _check_plot(plot: Path, controlnet: Path | None, strengths: list[float]) -> None:
    """Everything that could keep a chart from being written, before hours of drawing."""
    from ..training.chart import check_chart

    if controlnet is None:
        raise typer.BadParameter("--plot needs --controlnet: it shows control strengths")
    if not strengths:
        raise typer.BadParameter("--plot needs --strengths")
    check_png_path(plot)
    check_chart()


def _plot(path: Path, rows: list[ControlRow], limits: dict[str, ControlRow]) -> None:
    from ..training.sweep import sweep_chart, sweep_table

    png = io.BytesIO()
    sweep_chart(rows, limits).save(png, "PNG")
    for target, content in ((path, png.getvalue()),
                            (path.with_suffix(".csv"), sweep_table(rows, limits).encode())):
        with whole_file(target) as temporary:
            temporary.write_bytes(content)
        console.print(f"wrote {target}", highlight=False, soft_wrap=True)


def _table(title: str, reports: dict[str, Report]) -> None:
    from ..training.score import COLUMNS

    table = Table("pictures", "kind", "n", *(name.replace("color", "colour") for name in COLUMNS),
                  title=title, box=None, header_style="bold")
    for name, report in reports.items():
        kinds = [kind for kind in report.rows if kind != "all" or len(report.rows) > 2]
        for i, kind in enumerate(kinds):
            row = report.rows[kind]
            table.add_row(name if i == 0 else "", kind, str(row["all"].count),
                          *(str(row[column]) if column in row else "" for column in COLUMNS))
    console.print(table)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise typer.BadParameter(f"--strengths has {text!r}; write numbers of 0 or more, with "
                                 "commas between")
    return value
