"""What a trained model draws, in numbers: held-out prompts, the VAE's ceiling, and edges.

The judge (`detect`, `score`, `report`, `edge_agreement`) is no network; `judge_rates` says how
often it is wrong itself. Prompts come from `held_out_prompts`, which no training draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .detect import Detected, DetectedObject, detect, detect_all
from .edges import EdgeAgreement, edge_agreement
from .judge import judge_rates, renders
from .scenes import (
    Scene,
    SceneSettings,
    caption_naming,
    captions,
    draw_scene,
    outline,
)
from .scenes.captions import Caption
from .score import Report, Scores, Share, report, score

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..model.hed import HEDDetector
    from ..pipeline import Pipeline
    from ..vae import VAE

__all__ = [
    "ControlRow", "Detected", "DetectedObject", "DrawSettings", "EdgeAgreement", "Prompt", "Report",
    "Scores", "Share", "ceiling", "control_limits", "detect", "detect_all", "draw_pictures",
    "edge_agreement", "evaluate", "evaluate_control", "held_out_prompts", "judge_rates", "report",
    "score",
]

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompt:
    """A scene, the words for it and the attributes that they name."""

    scene: Scene
    caption: Caption


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn; None is the model's own, as in `Pipeline.generate`."""

    steps: int | None = None
    guidance: float | None = None
    sampler: str = "auto"
    seed: int = 0
    batch_size: int = 32
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use 1 or more")


@dataclass(frozen=True)
class ControlRow:
    """Pictures at one control strength: mean edge shares, F1's standard error, and attributes.

    `strength` is None for pictures that no model drew.
    """

    strength: float | None
    precision: float
    recall: float
    f1: float
    f1_error: float
    report: Report

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "report": self.report.to_dict()}


def held_out_prompts(count: int, seed: int = 1000, settings: SceneSettings | None = None,
                     attributes: Collection[str] | None = None) -> list[Prompt]:
    """`count` scenes of attribute combinations that no training draws, each with a caption.

    The caption names everything, or shapes, their count and `attributes`.
    """
    prompts = []
    for number in range(count):
        scene = draw_scene(seed, number, settings, "held_out")
        said = (captions(scene, seed, number, 1)[0] if attributes is None
                else caption_naming(scene, attributes, seed, number))
        prompts.append(Prompt(scene, said))
    return prompts


def evaluate(pipeline: Pipeline, prompts: Sequence[Prompt], settings: DrawSettings | None = None,
             progress: Progress | None = None) -> Report:
    """Draw a picture for every prompt, of its scene's size, and score what is asked for there.

    A batch's noise comes from the seed and the batch's number. Raises ValueError for settings that
    the model cannot follow.
    """
    pictures = draw_pictures(pipeline, prompts, settings, progress=progress)
    return _report(prompts, pictures)


def ceiling(vae: VAE, prompts: Sequence[Prompt], batch_size: int = 32) -> Report:
    """The same scores for the true renders after encoding and decoding: no model does better."""
    true = renders([p.scene for p in prompts])
    return _report(prompts, _through(vae, prompts, true, batch_size))


def draw_pictures(pipeline: Pipeline, prompts: Sequence[Prompt],
                  settings: DrawSettings | None = None, hints: Sequence[Tensor] | None = None,
                  strength: float = 1.0, progress: Progress | None = None) -> list[Tensor]:
    """A picture (3, H, W) in 0..1 for every prompt, in their order.

    `hints` (3, H, W), one for each prompt, steer by the pipeline's ControlNet. `progress(done,
    count)` follows every batch.
    """
    settings = settings or DrawSettings()
    pictures: dict[int, Tensor] = {}
    for number, rows in enumerate(_batches(prompts, settings.batch_size)):
        control = {} if hints is None else {
            "control_image": [_to_image(hints[i]) for i in rows], "control_strength": strength}
        scene = prompts[rows[0]].scene
        drawn = pipeline.generate(
            [prompts[i].caption.text for i in rows], height=scene.height, width=scene.width,
            steps=settings.steps, guidance=settings.guidance, sampler=settings.sampler,
            seed=settings.seed + number, **settings.extra, **control)
        pictures.update(zip(rows, map(_to_tensor, drawn), strict=True))
        if progress is not None:
            progress(len(pictures), len(prompts))
    return [pictures[i] for i in range(len(prompts))]


def evaluate_control(pipeline: Pipeline, prompts: Sequence[Prompt],
                     settings: DrawSettings | None = None,
                     strengths: Sequence[float] = STRENGTHS, hed: HEDDetector | None = None,
                     progress: Progress | None = None) -> list[ControlRow]:
    """How well pictures follow outlines, for each control strength; 0 is without the ControlNet.

    The hint of a prompt is the exact outline of its scene, or what `hed` finds in its render; the
    agreement is measured with the exact outline in any case. Prompts should leave out size and
    place (`held_out_prompts(..., attributes=("background", "color"))`), or words alone may do.
    """
    truth = _outlines(prompts)
    if hed is None:
        hints = [edges.expand(3, -1, -1) for edges in truth]
    else:
        device = next(hed.parameters()).device
        hints = [hed(image[None].to(device))[0].cpu().expand(3, -1, -1)
                 for image in renders([p.scene for p in prompts])]
    rows = []
    for strength in strengths:
        steer = None if strength == 0 else hints
        pictures = draw_pictures(pipeline, prompts, settings, steer, strength, progress)
        rows.append(_control_row(strength, prompts, pictures, truth))
    return rows


def control_limits(vae: VAE, prompts: Sequence[Prompt],
                   batch_size: int = 32) -> dict[str, ControlRow]:
    """The numbers of `evaluate_control` for the true renders, and for them after the VAE.

    The first are below 1 by what the judge itself gets wrong; no model passes the second.
    """
    truth, true = _outlines(prompts), renders([p.scene for p in prompts])
    decoded = _through(vae, prompts, true, batch_size)
    return {"ground truth": _control_row(None, prompts, true, truth),
            "VAE ceiling": _control_row(None, prompts, decoded, truth)}


def _control_row(strength: float | None, prompts: Sequence[Prompt], pictures: Sequence[Tensor],
                 truth: Sequence[Tensor]) -> ControlRow:
    edges = [edge_agreement(*pair) for pair in zip(pictures, truth, strict=True)]
    f1 = torch.tensor([e.f1 for e in edges])
    error = (f1.std() / math.sqrt(len(f1))).item() if len(f1) > 1 else 0.0
    return ControlRow(strength, sum(e.precision for e in edges) / len(edges),
                      sum(e.recall for e in edges) / len(edges), f1.mean().item(), error,
                      _report(prompts, pictures))


def _outlines(prompts: Sequence[Prompt]) -> list[Tensor]:
    return [outline([p.scene])[0] for p in prompts]


def _through(vae: VAE, prompts: Sequence[Prompt], images: Sequence[Tensor],
             batch_size: int) -> list[Tensor]:
    """What the VAE makes of a picture for each prompt."""
    decoded: dict[int, Tensor] = {}
    for rows in _batches(prompts, batch_size):
        made = vae.decode(vae.encode(torch.stack([images[i] for i in rows]))).cpu()
        decoded.update(zip(rows, made, strict=True))
    return [decoded[i] for i in range(len(prompts))]


def _report(prompts: Sequence[Prompt], pictures: Sequence[Tensor]) -> Report:
    return report([p.scene for p in prompts], pictures, [p.caption.named for p in prompts])


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Numbers of prompts of one picture size, up to `size` at a time."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.scene.width, prompt.scene.height), []).append(i)
    return [rows[start: start + size] for rows in groups.values()
            for start in range(0, len(rows), size)]


def _to_tensor(picture: Image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _to_image(image: Tensor) -> Image:
    from PIL import Image as PILImage

    return PILImage.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
