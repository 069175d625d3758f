"""PixArt LCM Sampler and Schedule against the engine and the custom samplers."""


import pytest
import torch
from checks import lcm_latents, relative, save, saved
from graphs import LCM, PROMPT, SIDE, TOKENS, StarterGraph

import pixart_core as pc
from pixart_core.starter import find_starter

STARTER = find_starter()
SCALE = 0.18215  # of SD 1.5 latents: what the network sees is the host's latent times this


@pytest.mark.parametrize("settings", [
    {}, {"steps": 6, "grid": "official", "seed": 11}, {"steps": 2, "strength": 0.5},
], ids=["default", "official", "strength"])
def test_lcm_equals_the_custom_samplers(host, settings):
    """PixArtLCMSchedule in SamplerCustom and SamplerCustomAdvanced at cfg 1, bit for bit."""
    settings = {"steps": 4, "strength": 1.0, "grid": "diffusers", "seed": 3, **settings}
    graph = StarterGraph(model=LCM)
    save(graph, graph.lcm(**settings), "node")
    seed = settings.pop("seed")
    schedule = graph.add("PixArtLCMSchedule", **settings)
    custom = graph.add("SamplerCustom", model=graph.model, add_noise=True, noise_seed=seed, cfg=1.0,
                       positive=graph.positive, negative=graph.negative, sampler=schedule[0],
                       sigmas=schedule[1], latent_image=graph.latent)
    guider = graph.add("BasicGuider", model=graph.model, conditioning=graph.positive)
    noise = graph.add("RandomNoise", noise_seed=seed)
    advanced = graph.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=schedule[0],
                         sigmas=schedule[1], latent_image=graph.latent)
    save(graph, custom, "custom")
    save(graph, advanced, "advanced")
    host.run(graph)
    expected = saved(host, "node")
    assert torch.equal(saved(host, "custom"), expected)
    assert torch.equal(saved(host, "advanced"), expected)


@pytest.fixture(scope="module")
def student(encoder):
    """The engine on the starter's student: latents (B, 4, 8, 8) of a seed and timesteps."""
    model = pc.load_transformer(STARTER.lcm, dtype=torch.float32)
    states, mask = encoder(PROMPT, max_tokens=TOKENS)
    caption = states[:, : int(mask.sum())]
    size = {"image_size": torch.full((1, 2), float(SIDE)), "aspect_ratio": torch.ones(1, 1)}

    @torch.inference_mode()
    def sample(timesteps, seed):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

        def predict(x, t):
            return model(x, torch.tensor([t]), caption, **size)[:, :4]

        return pc.sampling.sample_lcm(predict, noise, timesteps,
                                      pc.sampling.step_noise(noise.shape, seed))

    return sample


@pytest.mark.parametrize("grid", ["diffusers", "official"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_lcm_equals_the_engine(host, student, grid, steps):
    """bar: 1e-4 relative, over the whole run with its own noise."""
    latent = lcm_latents(host, steps=steps, grid=grid, seed=9)
    expected = student(pc.sampling.lcm_timesteps(steps, grid), 9)
    error = relative(latent * SCALE, expected)
    assert error < 1e-4, f"relative error {error:.2e}"


@pytest.mark.parametrize("steps", [3, 4, 6, 8])
def test_grids_differ(host, steps):
    """Both published lists of timesteps give a picture, not the same one."""
    official = lcm_latents(host, steps=steps, grid="official")
    diffusers = lcm_latents(host, steps=steps, grid="diffusers")
    assert official.isfinite().all() and diffusers.isfinite().all()
    assert relative(official, diffusers) > 1e-3


def test_progress_and_previews(host):
    graph = StarterGraph(model=LCM)
    node = graph.lcm(steps=4, seed=21)
    graph.picture(node)
    result = host.run(graph)
    counts = [(value, total) for where, value, total in result.progress if where == node.id]
    assert counts[-1] == (4, 4)
    assert {total for _, total in counts} == {4}
    previews = [p for p in result.previews if p.node in ("", node.id)]
    assert previews and all(min(p.image.size) >= 8 for p in previews)


def test_interrupting(host):
    """The run ends with the step that it is in, and the next prompt works."""
    graph = StarterGraph(model=LCM, width=512, height=512, batch=4)
    node = graph.lcm(steps=50)
    graph.picture(node)
    job = host.submit(graph)
    seen = job.wait_for(lambda result: any(n == node.id for n, *_ in result.progress))
    host.interrupt()
    at = max(value for where, value, _ in seen.progress if where == node.id)
    result = job.wait()
    assert result.status == "interrupted" and result.error.node == node.id
    assert max(value for where, value, _ in result.progress if where == node.id) <= at + 2 < 50
    assert lcm_latents(host, "after_interrupt").isfinite().all()


def test_seed_and_batch(host):
    """A seed gives one picture, another seed another; a batch holds different pictures."""
    graph = StarterGraph(model=LCM)
    save(graph, graph.lcm(seed=1), "first")
    save(graph, graph.lcm(seed=2), "second")
    repeated = graph.add("RepeatLatentBatch", samples=graph.latent, amount=2)
    save(graph, graph.lcm(seed=1, latent=repeated), "batch")
    host.run(graph)
    first, second, batch = saved(host, "first"), saved(host, "second"), saved(host, "batch")
    assert relative(first, second) > 0.02
    assert batch.shape == (2, 4, 8, 8)
    assert relative(batch[0], batch[1]) > 0.02
    assert torch.equal(lcm_latents(host, "again", seed=1), first)


def test_the_largest_seed(host):
    assert lcm_latents(host, "largest", seed=2**64 - 1).isfinite().all()


def encoded_picture(graph):
    """A LATENT with a picture in it: the stock teacher's, decoded and encoded again."""
    image = graph.add("VAEDecode", samples=graph.lcm(seed=5), vae=graph.vae)
    return graph.add("VAEEncode", pixels=image, vae=graph.vae)


def test_strength_keeps_the_picture(host):
    """The less strength, the nearer the encoded picture."""
    graph = StarterGraph(model=LCM)
    start = encoded_picture(graph)
    other = graph.encode("a small green square on a yellow background")
    save(graph, start, "start")
    for strength in (0.1, 0.5, 1.0):
        save(graph, graph.lcm(latent=start, positive=other, seed=6, strength=strength),
             f"strength_{strength}")
    host.run(graph)
    start = saved(host, "start")
    near, middle, far = (relative(saved(host, f"strength_{s}"), start) for s in (0.1, 0.5, 1.0))
    assert near < middle < far


def test_latent_mask(host):
    """Outside the mask the latent stays bit for bit, inside it changes."""
    graph = StarterGraph(model=LCM)
    start = encoded_picture(graph)
    mask = graph.add("SolidMask", value=0.0, width=64, height=64)
    hole = graph.add("SolidMask", value=1.0, width=32, height=64)
    mask = graph.add("MaskComposite", destination=mask, source=hole, x=0, y=0, operation="add")
    masked = graph.add("SetLatentNoiseMask", samples=start, mask=mask)
    save(graph, start, "before")
    save(graph, graph.lcm(latent=masked, seed=8,
                          positive=graph.encode("a small green square")), "after")
    host.run(graph)
    before, after = saved(host, "before"), saved(host, "after")
    assert relative(after[..., 4:], before[..., 4:]) < 1e-6
    assert relative(after[..., :4], before[..., :4]) > 0.1


def test_the_latent_that_came_in_is_not_changed(host):
    """It is used again by every other node that it is wired to."""
    graph = StarterGraph(model=LCM)
    start = encoded_picture(graph)
    save(graph, start, "once")
    host.run(graph)
    after = graph.lcm(latent=start, strength=0.5)
    save(graph, after, "sampled")
    host.run(graph)
    again = save(graph, start, "twice")
    graph.add("ProbeMemory", after=after)
    assert host.run(graph).ran(again)
    assert torch.equal(saved(host, "once"), saved(host, "twice"))
