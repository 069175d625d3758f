"""One seed, one picture: the ComfyUI workflow and the standalone pipeline agree to 1/255."""

import numpy as np
import pytest
import torch
from graphs import LCM, MODEL, SIDE, SIGMA, SMALL, StarterGraph
from PIL import Image

import pixart_core as pc
from pixart_core.starter import find_starter

PROMPT = "a large yellow star on the left on a purple background"


@pytest.fixture(scope="module")
def pipelines():
    starter = find_starter()
    return {name: pc.Pipeline.from_files(path, starter.t5_file, starter.vae, dtype=torch.float32,
                                         device="cpu")
            for name, path in ((MODEL, starter.transformer), (LCM, starter.lcm),
                               (SIGMA, starter.sigma))}


def difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def host_picture(host, graph, samples):
    save = graph.picture(samples)
    return host.picture(host.run(graph).images(save)[0])


@pytest.mark.parametrize("model", [MODEL, SIGMA])
@pytest.mark.parametrize("steps", [20, 7])
def test_dpm_with_guidance(host, pipelines, steps, model):
    """KSampler "dpmpp_2m" + "simple" against DPM-Solver++ of diffusers; alpha and Sigma share one
    VAE, whose latents each scales in its own way."""
    graph = StarterGraph(model=model, prompt=PROMPT)
    workflow = host_picture(host, graph, graph.ksampler(seed=7, steps=steps))
    alone = pipelines[model].generate(PROMPT, steps=steps, seed=7, **SMALL)
    assert difference(workflow, alone) <= 1


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("grid", ["diffusers", "official"])
def test_lcm(host, pipelines, steps, grid):
    graph = StarterGraph(model=LCM, prompt=PROMPT)
    workflow = host_picture(host, graph, graph.lcm(seed=3, steps=steps, grid=grid))
    alone = pipelines[LCM].generate(PROMPT, steps=steps, seed=3, lcm_grid=grid, **SMALL)
    assert difference(workflow, alone) <= 1


def test_a_size_that_is_no_multiple_of_16(host, pipelines):
    graph = StarterGraph(prompt=PROMPT, width=72, height=56)
    workflow = host_picture(host, graph, graph.ksampler(seed=1, steps=8))
    alone = pipelines[MODEL].generate(PROMPT, steps=8, seed=1, width=72, height=56)
    assert difference(workflow, alone) <= 1


@pytest.mark.parametrize("sampler", ["dpm", "lcm"])
def test_image_to_image(host, pipelines, sampler):
    """The same strength leaves the same picture."""
    source = Image.new("RGB", (SIDE, SIDE), (30, 160, 60))
    model = MODEL if sampler == "dpm" else LCM
    graph = StarterGraph(model=model, prompt=PROMPT)
    image = graph.add("LoadImage", image=host.upload(source, "green.png"))
    latent = graph.add("VAEEncode", pixels=image, vae=graph.vae)
    if sampler == "dpm":
        samples = graph.ksampler(seed=2, steps=10, denoise=0.5, latent_image=latent)
    else:
        samples = graph.lcm(seed=2, strength=0.5, latent=latent)
    workflow = host_picture(host, graph, samples)
    alone = pipelines[model].generate(PROMPT, steps=10 if sampler == "dpm" else 4, seed=2,
                                      image=source, strength=0.5, **SMALL)
    assert difference(workflow, alone) <= 1
