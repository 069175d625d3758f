"""The interrupt of the web page: heard within a step, and nothing is left of it afterwards."""

import pytest
import torch
from checks import save, saved
from graphs import LCM, MODEL, T5, TOKENS, StarterGraph
from prompt import Graph

BLOCKS = 6  # of the starter
STEPS = 25


def sampled(graph, kind, model, steps):
    """A sampler of ours or of the host on `model`."""
    if kind == "ksampler":
        return graph.ksampler(model=model, steps=steps)
    if kind == "lcm":
        return graph.lcm(model=model, steps=steps)
    if kind == "dmd":
        return graph.add("PixArtDMDSampler", model=model, positive=graph.positive,
                         latent=graph.latent, seed=0)
    sampler = graph.add("PixArtSASolver", eta=1.0)
    sigmas = graph.add("PixArtSchedule", solver="sa-solver", steps=steps, strength=1.0)
    return graph.add("SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=3.0,
                     positive=graph.positive, negative=graph.negative, sampler=sampler,
                     sigmas=sigmas, latent_image=graph.latent)


def graph_of(kind, steps, **probe):
    graph = StarterGraph(model=LCM if kind == "lcm" else MODEL)
    model = graph.add("ProbeCalls", model=graph.model, label="interrupt", **probe)
    node = sampled(graph, kind, model, steps)
    save(graph, node, f"interrupt_{kind}")
    return graph, node


def latents(host, kind):
    host.run(graph_of(kind, 4)[0])
    return saved(host, f"interrupt_{kind}")


def calls(host, label="interrupt"):
    """What the probe of that name counted in the prompt before."""
    graph = Graph()
    node = graph.add("ProbeCallsReport", label=label)
    return host.run(graph).json(node)


@pytest.mark.parametrize("kind", ["ksampler", "lcm", "sa-solver"])
def test_an_interrupt_ends_a_long_run(host, kind):
    """At most one more call of the model, and the next prompt draws what it drew before."""
    before = latents(host, kind)
    graph, node = graph_of(kind, STEPS, seconds=0.2)
    job = host.submit(graph)
    seen = job.wait_for(lambda result: any(n == node.id and value >= 2
                                           for n, value, _ in result.progress))
    host.interrupt()
    at = max(value for n, value, _ in seen.progress if n == node.id)
    result = job.wait()
    assert result.status == "interrupted" and result.error.node == node.id
    assert "execution_interrupted" in [kind for kind, _ in result.events]
    counted = calls(host)
    assert counted["after_interrupt"] == 0
    assert counted["calls"] <= at + 2 < STEPS
    assert torch.equal(latents(host, kind), before)


@pytest.mark.parametrize("kind", ["ksampler", "lcm", "sa-solver", "dmd"])
def test_an_interrupt_ends_the_step_that_it_comes_in(host, kind):
    """No block of the network runs after it, as one step of a large picture may take a minute."""
    at = 1 if kind == "dmd" else 3
    graph, node = graph_of(kind, 4, interrupt_at=at)
    result = host.run(graph, ok=False)
    assert result.status == "interrupted" and result.error.node == node.id
    counted = calls(host)
    assert (counted["calls"], counted["blocks"]) == (at, (at - 1) * BLOCKS)
    assert latents(host, kind).isfinite().all()


def test_an_interrupt_ends_the_encoding_of_many_prompts(host):
    """Between two prompts; on older hosts the encoder itself does not listen."""
    graph = Graph()
    clip = graph.add("ProbeInterruptingClip", clip=graph.add("PixArtT5Loader", t5_name=T5),
                     label="clip", at=2)
    node = graph.add("PixArtPromptBatch", clip=clip, clean_caption=True, max_tokens=TOKENS,
                     prompts="\n".join(f"a circle {i}" for i in range(5)))
    save(graph, node, "never")
    result = host.run(graph, ok=False)
    assert result.status == "interrupted" and result.error.node == node.id
    assert calls(host, "clip")["calls"] == 2
