"""Prompts of a batch joined with others by the host's own nodes: no text is lost."""

import pytest
import torch
from checks import relative, save, saved
from graphs import TOKENS, StarterGraph

FIRST = ["a large red circle", "a small yellow star on the left", "a green square"]
SECOND = ["on a blue background", "on purple", "on a white background, in the middle"]
EQUAL = ["a red circle", "a red circle", "a red circle"]
LONG = "a photograph of many people in a large city, blurred, dark, with text and borders"
JOIN = {
    "concat": lambda graph, to, other: graph.add("ConditioningConcat", conditioning_to=to,
                                                 conditioning_from=other),
    "average": lambda graph, to, other: graph.add("ConditioningAverage", conditioning_to=to,
                                                  conditioning_from=other,
                                                  conditioning_to_strength=0.5),
}


def prompt_batch(graph, prompts):
    return graph.add("PixArtPromptBatch", clip=graph.clip, prompts="\n".join(prompts),
                     clean_caption=True, max_tokens=TOKENS)


def draw(graph, name, positive, latent):
    save(graph, graph.ksampler(steps=3, seed=4, positive=positive, latent_image=latent), name)


@pytest.mark.parametrize(("join", "first", "second"), [
    ("concat", FIRST, SECOND), ("concat", EQUAL, SECOND), ("average", FIRST, SECOND),
])
def test_each_picture_is_that_of_its_joined_prompts_alone(host, join, first, second):
    """Beside a longer negative, which pads them all; padding of either batch stays unseen.

    bar: 3e-4 relative; the joined text moves the latents by percents.
    """
    graph = StarterGraph(negative=LONG, batch=len(first))
    batch = prompt_batch(graph, first)
    draw(graph, "joined", JOIN[join](graph, batch, prompt_batch(graph, second)), graph.latent)
    draw(graph, "unjoined", batch, graph.latent)
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        positive = JOIN[join](graph, graph.encode(one), graph.encode(other))
        draw(graph, f"alone_{i}", positive, graph.add(
            "LatentFromBatch", samples=graph.latent, batch_index=i, length=1))
    host.run(graph)
    joined, unjoined = saved(host, "joined"), saved(host, "unjoined")
    for i in range(len(first)):
        assert relative(joined[i], saved(host, f"alone_{i}")[0]) < 3e-4
        assert relative(joined[i], unjoined[i]) > 0.01


def test_a_zeroed_conditioning_stays_what_it_is(host):
    """ConditioningZeroOut is no padding: a batch of it is drawn as one of it alone."""
    graph = StarterGraph(batch=3)
    zeroed = graph.add("ConditioningZeroOut", conditioning=prompt_batch(graph, EQUAL))
    draw(graph, "zeroed", zeroed, graph.latent)
    first = graph.add("LatentFromBatch", samples=graph.latent, batch_index=0, length=1)
    alone = graph.add("ConditioningZeroOut", conditioning=graph.encode(EQUAL[0]))
    draw(graph, "zeroed_alone", alone, first)
    host.run(graph)
    assert relative(saved(host, "zeroed")[:1], saved(host, "zeroed_alone")) < 1e-4


def test_joined_prompts_in_a_file(host):
    """Saved with a mask for all their tokens, and drawn from it as without the file."""
    graph = StarterGraph(negative=LONG, batch=3)
    joined = JOIN["concat"](graph, prompt_batch(graph, FIRST), prompt_batch(graph, SECOND))
    shown = graph.add("PixArtSaveEmbeddings", conditioning=joined,
                      filename_prefix="embeddings/joined")
    draw(graph, "before_file", joined, graph.latent)
    name = host.run(graph).text(shown)
    graph = StarterGraph(negative=LONG, batch=3)
    loaded = graph.add("PixArtLoadEmbeddings", file=f"{name} [output]")
    save(graph, loaded, "joined_file")
    draw(graph, "after_file", loaded, graph.latent)
    host.run(graph)
    tensors = host.read_tensors("joined_file")
    mask = tensors["value.0.1.attention_mask"]
    assert mask.shape == tensors["value.0.0"].shape[:2]
    assert not tensors["value.0.0"][mask == 0].any()
    assert torch.equal(saved(host, "before_file"), saved(host, "after_file"))


@pytest.mark.parametrize(("shape", "words"), [
    ((1, 9), "1 captions of 6 tokens and an attention mask for 1 of 9"),
    ((2, 6), "attention mask for 2 of 6"),
])
def test_a_mask_of_other_captions_is_refused(host, shape, words):
    tensors = {"caption": torch.randn(1, 6, 128), "attention_mask": torch.ones(shape)}
    graph = StarterGraph()
    cond = graph.add("ProbeLoadConditioning", file=host.write_tensors("masked", tensors))
    graph.picture(graph.ksampler(steps=1, positive=cond))
    error = host.run(graph, ok=False).error
    assert error.node_type == "KSampler"
    assert words in error.message and "max_tokens" in error.message
