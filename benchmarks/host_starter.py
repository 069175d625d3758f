"""Held-out prompts through a real ComfyUI with these nodes and the starter weights, scored.

`python -m benchmarks.host_starter --comfyui PATH` starts the server itself (see
tests/host/launch.py), samples every prompt twice (20 steps of KSampler with guidance, 4 steps of
PixArt LCM Sampler) and prints the share of pictures with each attribute right.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .host_server import (
    REPOSITORY,
    Graph,
    Host,
    Node,
    add_comfyui_option,
    find_installation,
    started,
)
from .scenes import Scene, caption, sample_scene
from .score import ATTRIBUTES, report

STARTER = {"diffusion_models": ("pixart_starter", "pixart_starter_lcm"),
           "text_encoders": ("t5_starter",), "vae": ("vae_starter",)}
SIZE = 64


def ksampler_graph(text: str, seed: int) -> Graph:
    """20 steps of DPM-Solver++ (2M), simple schedule, guidance 4.5."""
    graph = Graph()
    model = graph.add("PixArtLoader", model_name="pixart_starter.safetensors")
    clip = graph.add("PixArtT5Loader", t5_name="t5_starter.safetensors")
    return _picture(graph, graph.add(
        "KSampler", model=model, seed=seed, steps=20, cfg=4.5, sampler_name="dpmpp_2m",
        scheduler="simple", denoise=1.0, positive=_encode(graph, clip, model, text),
        negative=_encode(graph, clip, model, ""), latent_image=_empty(graph),
    ))


def lcm_graph(text: str, seed: int) -> Graph:
    """4 steps of the consistency-distilled weights, no guidance."""
    graph = Graph()
    model = graph.add("PixArtLoader", model_name="pixart_starter_lcm.safetensors")
    clip = graph.add("PixArtT5Loader", t5_name="t5_starter.safetensors")
    return _picture(graph, graph.add(
        "PixArtLCMSampler", model=model, positive=_encode(graph, clip, model, text),
        latent=_empty(graph), seed=seed, steps=4, strength=1.0,
    ))


METHODS: dict[str, Callable[[str, int], Graph]] = {
    "KSampler dpmpp_2m simple, 20 steps, cfg 4.5": ksampler_graph,
    "PixArtLCMSampler, 4 steps": lcm_graph,
}


def _encode(graph: Graph, clip: Node, model: Node, text: str) -> Node:
    return graph.add("PixArtTextEncode", clip=clip, model=model, text=text, clean_caption=True,
                     max_tokens=300)


def _empty(graph: Graph) -> Node:
    return graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)


def _picture(graph: Graph, latent: Node) -> Graph:
    vae = graph.add("VAELoader", vae_name="vae_starter.safetensors")
    decoded = graph.add("VAEDecode", samples=latent, vae=vae)
    graph.add("SaveImage", images=decoded, filename_prefix="host_starter")
    return graph


def held_out_prompts(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes of attribute combinations that the starter never saw, and their full captions."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, True) for _ in range(count)]
    return scenes, [caption(scene, rng, full=True) for scene in scenes]


def sample(host: Host, method: Callable[[str, int], Graph],
           texts: Sequence[str]) -> tuple[list[Tensor], list[float]]:
    """A picture (3, H, W) in 0..1 and the seconds it took, for each prompt; seed i for the i-th."""
    images, seconds = [], []
    for i, text in enumerate(texts):
        result = host.run(method(text, i))
        [saved] = result.images("SaveImage")
        images.append(_to_tensor(host.picture(saved)))
        seconds.append(result.seconds)
        if sys.stderr.isatty():
            print(f"\r{i + 1} of {len(texts)}\r", end="", file=sys.stderr, flush=True)
    return images, seconds


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_starter", description=__doc__)
    add_comfyui_option(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2024, help="names the set of held-out scenes")
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use the graphics card")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    options = parser.parse_args(arguments)
    installation = find_installation(parser, options.comfyui)

    scenes, texts = held_out_prompts(options.prompts, options.seed)
    scores = {}
    print(f"ComfyUI {installation.version}, {options.prompts} held-out prompts, "
          f"seed {options.seed}")
    print(f"{'':45}{'all':>7}" + "".join(f"{name:>7}" for name in ATTRIBUTES) + "  s/picture")
    with started(installation, () if options.gpu else ("--cpu",)) as host:
        for folder, names in STARTER.items():
            for name in names:
                host.add_model(folder, REPOSITORY / "starter" / folder / f"{name}.safetensors")
        for label, method in METHODS.items():
            images, seconds = sample(host, method, texts)
            mean = scores[label] = report(scenes, images)["all"]
            mean["seconds"] = statistics.median(seconds)
            print(f"{label:45}" + "".join(f"{mean[name]:7.1%}" for name in ("all", *ATTRIBUTES))
                  + f"{mean['seconds']:11.2f}")
    if options.json:
        entry = {"comfyui": installation.version, "prompts": options.prompts,
                 "seed": options.seed, "scores": scores}
        options.json.write_text(json.dumps(entry, indent=2) + "\n")


if __name__ == "__main__":
    main()
