"""Held-out prompts through a real ComfyUI with these nodes and the starter weights, scored.

`python -m benchmarks.host_starter --comfyui PATH` starts the server itself (see
tests/host/launch.py), samples every prompt three times (20 steps of KSampler with guidance on the
alpha and on the Sigma model, 4 steps of PixArt LCM Sampler) and prints the share of pictures with
each attribute right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixart_core.starter import Starter
from pixart_core.training.evaluate import Prompt, held_out_prompts, report
from pixart_core.training.scenes import ATTRIBUTES, Scene

from .held_out import SCENES
from .host_server import (
    REPOSITORY,
    Graph,
    Host,
    Node,
    add_comfyui_option,
    find_installation,
    started,
)

ALPHA, SIGMA, LCM = "pixart_starter", "pixart_starter_sigma", "pixart_starter_lcm"
STARTER = {"diffusion_models": (ALPHA, SIGMA, LCM), "text_encoders": ("t5_starter",),
           "vae": ("vae_starter",)}
GUIDANCE = Starter.guidance


def ksampler_graph(prompt: Prompt, seed: int, name: str = ALPHA) -> Graph:
    """20 steps of DPM-Solver++ (2M), simple schedule, with guidance."""
    graph, model, clip = _loaders(name)
    return _picture(graph, graph.add(
        "KSampler", model=model, seed=seed, steps=20, cfg=GUIDANCE, sampler_name="dpmpp_2m",
        scheduler="simple", denoise=1.0,
        positive=_encode(graph, clip, model, prompt.caption.text),
        negative=_encode(graph, clip, model, ""), latent_image=_empty(graph, prompt.scene),
    ))


def sigma_graph(prompt: Prompt, seed: int) -> Graph:
    """The same with the Sigma model, on the same VAE and T5."""
    return ksampler_graph(prompt, seed, SIGMA)


def lcm_graph(prompt: Prompt, seed: int) -> Graph:
    """4 steps of the consistency-distilled weights, no guidance."""
    graph, model, clip = _loaders(LCM)
    return _picture(graph, graph.add(
        "PixArtLCMSampler", model=model, seed=seed, steps=4, strength=1.0,
        positive=_encode(graph, clip, model, prompt.caption.text),
        latent=_empty(graph, prompt.scene),
    ))


Method = Callable[[Prompt, int], Graph]
METHODS: dict[str, Method] = {
    f"KSampler dpmpp_2m simple, 20 steps, cfg {GUIDANCE:g}": ksampler_graph,
    "the same, Sigma": sigma_graph,
    "PixArtLCMSampler, 4 steps": lcm_graph,
}


def _loaders(name: str) -> tuple[Graph, Node, Node]:
    graph = Graph()
    model = graph.add("PixArtLoader", model_name=f"{name}.safetensors")
    return graph, model, graph.add("PixArtT5Loader", t5_name="t5_starter.safetensors")


def _encode(graph: Graph, clip: Node, model: Node, text: str) -> Node:
    return graph.add("PixArtTextEncode", clip=clip, model=model, text=text, clean_caption=True,
                     max_tokens=300)


def _empty(graph: Graph, scene: Scene) -> Node:
    return graph.add("EmptyLatentImage", width=scene.width, height=scene.height, batch_size=1)


def _picture(graph: Graph, latent: Node) -> Graph:
    vae = graph.add("VAELoader", vae_name="vae_starter.safetensors")
    decoded = graph.add("VAEDecode", samples=latent, vae=vae)
    graph.add("SaveImage", images=decoded, filename_prefix="host_starter")
    return graph


def sample(host: Host, method: Method,
           prompts: Sequence[Prompt]) -> tuple[list[Tensor], list[float]]:
    """A picture (3, H, W) in 0..1 and the seconds it took, for each prompt; seed i for the i-th."""
    images, seconds = [], []
    for i, prompt in enumerate(prompts):
        result = host.run(method(prompt, i))
        [saved] = result.images("SaveImage")
        images.append(_to_tensor(host.picture(saved)))
        seconds.append(result.seconds)
        if sys.stderr.isatty():
            print(f"\r{i + 1} of {len(prompts)}\r", end="", file=sys.stderr, flush=True)
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

    prompts = held_out_prompts(options.prompts, options.seed, SCENES)
    scores: dict[str, dict[str, Any]] = {}
    print(f"ComfyUI {installation.version}, {options.prompts} held-out prompts, "
          f"seed {options.seed}")
    print(f"{'':45}" + "".join(f"{name:>12}" for name in ("all", *ATTRIBUTES)) + "  s/picture")
    with started(installation, () if options.gpu else ("--cpu",)) as host:
        for folder, names in STARTER.items():
            for name in names:
                host.add_model(folder, REPOSITORY / "starter" / folder / f"{name}.safetensors")
        for label, method in METHODS.items():
            images, seconds = sample(host, method, prompts)
            found = report([p.scene for p in prompts], images, [p.caption.named for p in prompts])
            median = statistics.median(seconds)
            scores[label] = {**found.to_dict()["all"], "seconds": median}
            shares = found.rows["all"]
            print(f"{label:45}" + "".join(f"{shares[name].mean:12.1%}"
                                          for name in ("all", *ATTRIBUTES)) + f"{median:11.2f}")
    if options.json:
        entry = {"comfyui": installation.version, "prompts": options.prompts,
                 "seed": options.seed, "scores": scores}
        options.json.write_text(json.dumps(entry, indent=2) + "\n")


if __name__ == "__main__":
    main()
