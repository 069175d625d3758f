"""How well the starter ControlNet's pictures follow edges, with and without it.

`OMP_NUM_THREADS=1 python -m benchmarks.control_score` takes the edges of held-out scenes with the
starter HED and samples pictures along them, in colours of other scenes; prints a table for
RESULTS.md. The words name the hint's shape alone, or all of another scene, so that shape, size and
place are wrong and the edges have to decide. `pixart train evaluate --controlnet` has the same
judge and tries more strengths.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import pixart_core as pc
from pixart_core.starter import Starter, find_starter
from pixart_core.training.evaluate import (
    ControlRow,
    DrawSettings,
    Prompt,
    evaluate_control,
)
from pixart_core.training.scenes import (
    Scene,
    SceneSettings,
    caption_naming,
    draw_scene,
    full_caption,
)
from pixart_core.training.scenes.captions import Caption

from .held_out import SQUARE

COLUMNS = ("edge F1", "colour", "background")
COLORS = ("background", "color")
_OTHER_SEED = 1  # added to the seed: scenes whose colours and words are taken


def recoloured(scene: Scene, other: Scene) -> Scene:
    """The geometry of `scene` in the colours of `other`; both have one object."""
    thing = dataclasses.replace(scene.objects[0], color=other.objects[0].color)
    return dataclasses.replace(scene, background=other.background, objects=(thing,))


def prompts_for(count: int, seed: int, wrong: bool,
                settings: SceneSettings = SQUARE) -> list[Prompt]:
    """Held-out scenes in colours of others, and words for them.

    The words are the shape and the colours; with `wrong` those of the whole other scene, of which
    the colours alone are asked for.
    """
    prompts = []
    for number in range(count):
        scene = draw_scene(seed, number, settings, "held_out")
        other = draw_scene(seed + _OTHER_SEED, number, settings)
        hint = recoloured(scene, other)
        said = (Caption(full_caption(other, seed, number), frozenset(COLORS)) if wrong
                else caption_naming(hint, COLORS, seed, number))
        prompts.append(Prompt(hint, said))
    return prompts


def measure(starter: Starter, count: int, seed: int,
            guidance: float | None = None) -> Iterator[tuple[str, ControlRow]]:
    """(row, scores) for both samplers, both kinds of words, without and with control."""
    guidance = starter.guidance if guidance is None else guidance
    detector = pc.HEDDetector.from_path(starter.hed)
    for name, file, settings in (
            (f"20 steps, guidance {guidance:g}", starter.transformer,
             DrawSettings(guidance=guidance, seed=seed)),
            ("LCM, 4 steps", starter.lcm, DrawSettings(seed=seed))):
        pipeline = pc.Pipeline.from_files(file, starter.t5, starter.vae, device="cpu",
                                          controlnet=starter.controlnet)
        for wrong in (False, True):
            rows = evaluate_control(pipeline, prompts_for(count, seed, wrong), settings,
                                    (0.0, 1.0), detector)
            for row, steered in zip(rows, ("no", "yes"), strict=True):
                yield f"{name} | {'all wrong' if wrong else 'shape only'} | {steered}", row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control_score",
                                     description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="hints; default 64")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--guidance", type=float, help="of the 20 steps [the starter's]")
    options = parser.parse_args(arguments)
    starter = find_starter()
    if starter is None:
        parser.error("the starter models are not in this installation")
    print(f"| sampler | words on geometry | control | {' | '.join(COLUMNS)} |")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    for label, row in measure(starter, options.count, options.seed, options.guidance):
        shares = row.report.rows["all"]
        cells = [f"{row.f1:.2f}", f"{shares['color'].mean:.0%}", f"{shares['background'].mean:.0%}"]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
