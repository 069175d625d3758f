"""How well the starter ControlNet's pictures follow edges, with and without it.

`OMP_NUM_THREADS=1 python -m benchmarks.control_score` draws shapes of any size anywhere in
pictures of colours and shapes kept from training, takes their edges with the starter HED, and
samples pictures from them; prints a table for RESULTS.md. Outlines are compared by a judge that
is no network: the part of the picture that stands out from its rim.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import pixart_core as pc
from pixart_core.sampling import (
    dpm_timesteps,
    lcm_timesteps,
    sample_dpm,
    sample_lcm,
    step_noise,
)
from pixart_core.starter import Starter, find_starter

from .scenes import SIZE, Scene, coverage, render, sample_scene
from .score import detect

RADII = (8.0, 18.0)
GUIDANCE = 3.0  # of the templates; at the starter's own 4.5 shapes grow beyond their edges
COLUMNS = ("edge F1", "overlap", "colour", "background")


def anywhere(rng: random.Random) -> Scene:
    """A held-out scene of one object whose size and place no words name."""
    scene = sample_scene(rng, want_held=True)
    [o] = scene["objs"]
    o["r"] = rng.uniform(*RADII)
    margin = 1.1 * o["r"] + 1.5
    o["cx"], o["cy"] = (rng.uniform(margin, SIZE - margin) for _ in range(2))
    return scene


def shape_mask(image: Tensor) -> Tensor:
    """Where a picture (3, 64, 64) in 0..1 differs from its rim by half of what its object does."""
    rim = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1),
                     image[:, :, :2].flatten(1), image[:, :, -2:].flatten(1)], 1)
    contrast = (image - rim.median(1).values[:, None, None]).norm(dim=0)
    inside = contrast > 0.16
    if not inside.any():
        return inside
    return inside & (contrast > 0.5 * contrast[inside].quantile(0.8))


def outline(mask: Tensor) -> Tensor:
    """The pixels of a bool mask (H, W) that have a neighbour outside it."""
    outside = functional.max_pool2d((~mask).float()[None, None], 3, 1, 1)[0, 0]
    return mask & (outside > 0)


def edge_f1(found: Tensor, wanted: Tensor, tolerance: int = 1) -> float:
    """F1 of two bool edge maps (H, W): pixels within `tolerance` of one of the other are right."""
    def right(edges: Tensor, others: Tensor) -> float:
        near = functional.max_pool2d(others.float()[None, None], 2 * tolerance + 1, 1, tolerance)
        return (near[0, 0][edges] > 0).float().mean().item() if edges.any() else 0.0

    precision, recall = right(found, wanted), right(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def agreement(scene: Scene, image: Tensor, color: str, background: str) -> tuple[float, ...]:
    """COLUMNS of a picture (3, 64, 64) in 0..1 whose edges came from `scene`."""
    [o] = scene["objs"]
    place = (torch.tensor([o[name]]) for name in ("cx", "cy", "r"))
    wanted = coverage(o["shape"], *place)[0] > 0.5
    found = shape_mask(image)
    overlap = (found & wanted).sum() / (found | wanted).sum()
    seen = detect(image)
    return (edge_f1(outline(found), outline(wanted)), overlap.item(),
            float(bool(seen["objs"]) and seen["objs"][0]["color"] == color),
            float(seen["bg"] == background))


def prompt_for(scene: Scene, other: Scene, wrong: bool) -> str:
    """Colours of `other`; the shape of `scene`, or `other`'s shape, size and place as well."""
    [o], [asked] = scene["objs"], other["objs"]
    if not wrong:
        return f"a {asked['color']} {o['shape']} on a {other['bg']} background"
    where = {"left": "on the left", "right": "on the right", "top": "at the top",
             "bottom": "at the bottom", "centre": "in the centre"}[other["pos"]]
    return (f"a {asked['size']} {asked['color']} {asked['shape']} {where} on a {other['bg']} "
            "background")


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def find_edges(starter: Starter, scenes: Sequence[Scene]) -> Tensor:
    """The edges of the rendered scenes, white on black, (N, 3, 64, 64) in 0..1."""
    detector = pc.HEDDetector.from_path(starter.hed)
    return detector(render(list(scenes), jitter=0.0)).expand(-1, 3, -1, -1)


@torch.inference_mode()
def sample(pipeline: pc.Pipeline, prompts: list[str], seed: int, edges: Tensor | None = None,
           guidance: float = GUIDANCE) -> Tensor:
    """A picture (3, 64, 64) for each prompt, each along its own edges, in one batch.

    Pipeline.generate takes one control image for all its prompts.
    """
    lcm = pipeline.config.distilled == "lcm"
    captions, mask = pipeline.encoder(prompts if lcm else [""] * len(prompts) + prompts,
                                      max_tokens=pipeline.config.max_tokens)
    prepared = pipeline.transformer.prepare_caption(captions, mask.bool())
    control = ()
    if edges is not None:
        latent = pipeline.vae.encode(edges)
        control = (pc.Control(pipeline.controlnet, latent if lcm else torch.cat([latent] * 2)),)

    def predict(x: Tensor, t: int) -> Tensor:
        batched = x if lcm else torch.cat([x, x])
        timestep = torch.full((len(batched),), t)
        eps = pipeline.transformer(batched, timestep, prepared, control=control)[:, :4]
        if lcm:
            return eps
        without, with_prompt = eps.chunk(2)
        return without + guidance * (with_prompt - without)

    shape = (len(prompts), 4, SIZE // 8, SIZE // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if lcm:
        latents = sample_lcm(predict, x, lcm_timesteps(4), step_noise(shape, seed))
    else:
        latents = sample_dpm(predict, x, dpm_timesteps(20))
    return pipeline.vae.decode(latents)


def measure(starter: Starter, count: int, seed: int, guidance: float = GUIDANCE,
            out: Path | None = None) -> Iterator[tuple[str, tuple[float, ...]]]:
    """(row, means of COLUMNS) for both samplers, both kinds of prompts, without and with control.

    `out` gets a sheet of hints and pictures for each row.
    """
    rng = random.Random(seed)
    scenes = [anywhere(rng) for _ in range(count)]
    others = [sample_scene(rng) for _ in range(count)]
    edges = find_edges(starter, scenes)
    for name, file in ((f"20 steps, guidance {guidance:g}", starter.transformer),
                       ("LCM, 4 steps", starter.lcm)):
        pipeline = pc.Pipeline.from_files(file, starter.t5, starter.vae, device="cpu",
                                          controlnet=starter.controlnet)
        for wrong in (False, True):
            prompts = [prompt_for(*pair, wrong) for pair in zip(scenes, others, strict=True)]
            for steered in (False, True):
                pictures = sample(pipeline, prompts, seed, edges if steered else None,
                                  guidance)
                rows = [agreement(scene, picture, other["objs"][0]["color"], other["bg"])
                        for scene, picture, other in zip(scenes, pictures, others, strict=True)]
                label = (f"{name} | {'all wrong' if wrong else 'shape only'} | "
                         f"{'yes' if steered else 'no'}")
                if out is not None:
                    shown = [image for pair in zip(edges, pictures, strict=True) for image in pair]
                    save_grid(shown, out / f"{label.replace(' | ', ', ')}.png")
                yield label, tuple(torch.tensor(rows).mean(0).tolist())


def save_grid(pictures: Sequence[Tensor], file: Path, columns: int = 16) -> None:
    """Pictures (3, 64, 64), row by row, each hint before its picture."""
    rows = [torch.cat(list(pictures[i:i + columns]), 2) for i in range(0, len(pictures), columns)]
    rows = [functional.pad(row, (0, columns * SIZE - row.shape[2])) for row in rows]
    grid = (torch.cat(rows, 1) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(grid).save(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control_score",
                                     description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="hints; default 64")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of the 20 steps")
    parser.add_argument("--out", type=Path, help="folder for sheets of hints and pictures")
    options = parser.parse_args(arguments)
    starter = find_starter()
    if starter is None:
        parser.error("the starter models are not in this installation")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    print(f"| sampler | words on geometry | control | {' | '.join(COLUMNS)} |")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    for label, (f1, overlap, *shares) in measure(starter, options.count, options.seed,
                                                 options.guidance, options.out):
        cells = [f"{f1:.2f}", f"{overlap:.2f}", *(f"{share:.0%}" for share in shares)]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
