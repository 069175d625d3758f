"""Weights together with cleaning, a prompt for each picture, and embeddings in files."""

import os

import numpy as np
import pytest
import torch
from checks import refused, relative, save, saved
from graphs import LCM, MODEL, PROMPT, SIDE, T5, TOKENS, Graph, StarterGraph
from safetensors.torch import save_file

from pixart_core.text import clean_caption
from pixart_core.text.embeddings import CaptionEntry, load_embeddings, save_embeddings
from pixart_core.text.weights import encode_prompt

PROMPTS = ["a large red circle on a blue background",
           "a small yellow star on the left on a purple background, nothing else",
           "a green square"]
ODD = ["a (red:1.5) circle", "((a large)) circle (red:0.6)", "smile :) (left:1.2) and (",
       r"a \(red\) ((circle:0.3) on blue:1.4)", "(:1.2) a (circle :-0.5)"]


def states_of(host, *encoders):
    """The states that nodes give, each (class, inputs) on the starter's T5."""
    graph = Graph()
    clip = graph.add("PixArtT5Loader", t5_name=T5)
    for i, (node, inputs) in enumerate(encoders):
        save(graph, graph.add(node, clip=clip, **inputs), f"states_{i}")
    host.run(graph)
    return [saved(host, f"states_{i}", "value.0.0") for i in range(len(encoders))]


def ours(text, clean=True, **changes):
    return "PixArtTextEncode", {"text": text, "clean_caption": clean, "max_tokens": 300, **changes}


def stock(text):
    return "CLIPTextEncode", {"text": text}


def test_weights_with_cleaning_equal_the_stock_node(host):
    """Bit for bit, with the text cleaned by hand; the same without cleaning, also odd brackets."""
    pairs = [(ours("A LARGE (Red:1.5) circle, ON https://x.com (blue)"),
              stock("a large (red:1.5) circle, on (blue)")),
             *((ours(text, clean=False), stock(text)) for text in ODD)]
    states = states_of(host, *(node for pair in pairs for node in pair))
    for i, (mine, theirs) in enumerate(zip(states[::2], states[1::2], strict=True)):
        assert torch.equal(mine, theirs), pairs[i]


def test_weights_count_and_can_be_left_out(host):
    """On, a word's states move; off, and in a prompt without brackets, nothing does."""
    plain = "a red circle"
    weighted, one, off, bracketed = states_of(
        host, ours("a (red:1.5) circle"), ours(plain), ours(plain, weights=False),
        ours("a (red) circle", weights=False))
    by_hand, = states_of(host, stock(clean_caption("a (red) circle")))
    assert 1e-3 < relative(weighted, one) < 1.0
    assert torch.equal(off, one) and torch.equal(bracketed, by_hand)


@pytest.mark.parametrize("clean", [True, False])
def test_the_engine_weights_as_the_host_does(host, encoder, clean):
    """bar: 1e-5 relative, so that a workflow and `pixart generate` draw one picture."""
    texts = [*ODD, "A large (RED:1.4) circle, (on a blue background:0.7)"]
    states = states_of(host, *(ours(text, clean) for text in texts))
    for text, state in zip(texts, states, strict=True):
        mine = encode_prompt(encoder, text, 300, clean_caption if clean else None)
        assert mine.shape == state[0].shape
        assert relative(mine, state[0]) < 1e-5, text


def test_a_weight_that_is_no_number(host):
    graph = StarterGraph(prompt="a (red:nan) circle")
    graph.picture(graph.lcm(steps=1))
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtTextEncode" and "weight nan" in error.message


def batch_graph(model=MODEL, prompts=PROMPTS, pictures=None):
    graph = StarterGraph(model=model)
    batch = graph.add("PixArtPromptBatch", clip=graph.clip, prompts="\n\n".join(prompts) + "\n ",
                      clean_caption=True, max_tokens=300, model=graph.model)
    graph.latent = graph.add("EmptyLatentImage", width=SIDE, height=SIDE,
                             batch_size=pictures or batch[1])
    graph.positive = batch
    return graph


@pytest.mark.parametrize("sampler", ["ksampler", "lcm"])
def test_each_picture_is_that_of_its_prompt_alone(host, sampler):
    """bar: 1/255 with the noise of that place in the batch; one negative for all."""
    graph = batch_graph(MODEL if sampler == "ksampler" else LCM)

    def draw(positive, latent):
        if sampler == "ksampler":
            return graph.ksampler(steps=6, positive=positive, latent_image=latent, seed=4)
        # one step: noise between steps is that of the whole batch
        return graph.lcm(positive=positive, latent=latent, seed=4, steps=1)

    saves = [graph.picture(draw(graph.positive, graph.latent))]
    for i, prompt in enumerate(PROMPTS):
        one = graph.add("LatentFromBatch", samples=graph.latent, batch_index=i, length=1)
        saves.append(graph.picture(draw(graph.encode(prompt), one)))
    result = host.run(graph)
    together, *alone = ([np.asarray(host.picture(image), np.int16)
                         for image in result.images(node)] for node in saves)
    assert len(together) == len(PROMPTS)
    for picture, (single,) in zip(together, alone, strict=True):
        assert np.abs(picture - single).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 50


def test_the_batch_reports_every_prompt(host):
    graph = batch_graph()
    save(graph, graph.positive, "prompt_batch")
    save(graph, graph.positive[1], "prompt_count")
    result = host.run(graph)
    lines = result.text("PixArtPromptBatch").splitlines()
    assert [line[:3] for line in lines] == ["1: ", "2: ", "3: "]
    assert all(line.endswith(f"of {TOKENS} tokens") for line in lines)
    mask = saved(host, "prompt_batch", "value.0.1.attention_mask")
    assert mask.sum(dim=1).tolist() == [int(line.split()[1]) for line in lines]


@pytest.mark.parametrize("pictures", [1, 2, 6])
def test_a_batch_of_another_size_is_refused(host, pictures):
    """The host would drop prompts, or draw some twice, without a word."""
    graph = batch_graph(pictures=pictures)
    graph.picture(graph.ksampler(steps=1))
    error = host.run(graph, ok=False).error
    assert error.node_type == "KSampler"
    assert "3 prompts" in error.message and f"{pictures} pictures" in error.message


def test_a_batch_without_prompts_is_refused(host):
    graph = batch_graph(prompts=[" ", ""], pictures=1)
    graph.picture(graph.ksampler(steps=1))
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtPromptBatch" and "no prompt" in error.message


def test_prompts_of_equal_length_need_no_mask(host):
    graph = batch_graph(prompts=[PROMPT, PROMPT])
    save(graph, graph.positive, "equal_batch")
    values = host.run(graph).json("ProbeSaveTensors")
    assert list(values["tensors"]) == ["value.0.0"]


def load_graph(name):
    """A graph that draws from files alone: no text encoder in it."""
    graph = Graph()
    loaded = graph.add("PixArtLoadEmbeddings", file=name)
    model = graph.add("PixArtLoader", model_name=MODEL)
    latent = graph.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)
    graph.add("ProbeSaveTensors", value=loaded, name="loaded")
    save(graph, graph.add("KSampler", model=model, positive=loaded, negative=loaded, seed=1,
                          latent_image=latent, steps=2, cfg=1.0, sampler_name="dpmpp_2m",
                          scheduler="simple", denoise=1.0), "drawn")
    return graph, loaded


def test_embeddings_come_back_bit_for_bit(host):
    """A prompt batch with its mask, sizes and an area mask: tensors, values and what is drawn."""
    graph = StarterGraph()
    sized = graph.encode("a (red:1.2) circle", width=96, height=64, aspect_ratio=0.7)
    mask = graph.add("SolidMask", value=0.5, width=64, height=64)
    masked = graph.add("ConditioningSetMask", conditioning=sized, mask=mask, strength=0.8,
                       set_cond_area="default")
    area = graph.add("ConditioningSetArea", conditioning=sized, width=64, height=64, x=0, y=8,
                     strength=1.0)
    batch = graph.add("PixArtPromptBatch", clip=graph.clip, prompts="\n".join(PROMPTS),
                      clean_caption=True, max_tokens=300)
    both = graph.add("ConditioningCombine", conditioning_1=masked, conditioning_2=area)
    both = graph.add("ConditioningCombine", conditioning_1=both, conditioning_2=batch)
    shown = graph.add("PixArtSaveEmbeddings", conditioning=both,
                      filename_prefix="embeddings/everything")
    before = save(graph, both, "saved")
    result = host.run(graph)
    name = result.text(shown)
    assert name == "embeddings/everything_00001_.safetensors" and (host.output_dir / name).is_file()
    assert not list((host.output_dir / "embeddings").glob("*.part"))

    graph = Graph()
    loaded = graph.add("PixArtLoadEmbeddings", file=f"{name} [output]")
    after = save(graph, loaded, "loaded")
    again = host.run(graph)
    assert again.json(after) == result.json(before)
    tensors = host.read_tensors("saved")
    assert len(tensors) >= 5
    assert all(torch.equal(t, tensors[k]) for k, t in host.read_tensors("loaded").items())
    assert set(again.text(loaded).splitlines()) == {"a (red:1.2) circle", *PROMPTS}


def test_a_file_of_the_command_line_draws_without_a_text_encoder(host, encoder):
    """`pixart encode` and the node write one format; the picture is the engine's own prompt's."""
    states = encode_prompt(encoder, PROMPT, TOKENS, clean_caption)
    folder = host.models_dir / "embeddings"
    folder.mkdir(exist_ok=True)
    save_embeddings(folder / "cli.safetensors", [CaptionEntry(states[None])], {"prompt": PROMPT})
    graph, loaded = load_graph("cli.safetensors")
    result = host.run(graph)
    assert result.text(loaded) == PROMPT
    assert torch.equal(saved(host, "loaded", "value.0.0")[0], states)

    graph = StarterGraph()
    shown = graph.add("PixArtSaveEmbeddings", conditioning=graph.positive,
                      filename_prefix="embeddings/node")
    save(graph, graph.ksampler(seed=1, steps=2, cfg=1.0), "encoded")
    path = host.output_dir / host.run(graph).text(shown)
    entries, info = load_embeddings(path)
    assert info == {"prompt": PROMPT, "encoder": T5} and len(entries) == 1
    assert relative(entries[0].caption[0], states) < 1e-5
    assert relative(saved(host, "drawn"), saved(host, "encoded")) < 1e-4


def test_files_that_hold_no_prompt_are_refused(host):
    """Before anything runs, once, and with what to do."""
    folder = host.models_dir / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"t5xxl": torch.ones(2, 64)}, folder / "inversion.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for name, word in (("inversion.safetensors", "no encoded prompt"),
                       ("cut.safetensors", "cut short")):
        graph, loaded = load_graph(name)
        refused(host, graph, name, word, node=loaded)


@pytest.mark.parametrize("name", [
    "embeddings/../../outside.safetensors [output]", "../outside.safetensors [output]",
    r"..\outside.safetensors [output]", r"embeddings\..\..\outside.safetensors [output]",
    r"C:\outside.safetensors [output]", "C:outside.safetensors [output]",
    "../outside.safetensors", "embeddings/nothing.safetensors [output]",
])
def test_names_that_lead_elsewhere_are_refused(host, name):
    """Slashes, backslashes and drives on every system: a workflow may come from another one."""
    entry = CaptionEntry(torch.ones(1, 3, 128))
    save_embeddings(host.output_dir.parent / "outside.safetensors", [entry], {})
    if os.name != "nt" and ("\\" in name or ":" in name):  # there a name like any other
        save_embeddings(host.output_dir / name.removesuffix(" [output]"), [entry], {})
    graph, loaded = load_graph(name)
    refused(host, graph, "is not in the embeddings folders", node=loaded)


def test_conditioning_that_no_file_can_hold(host):
    """A ControlNet in it: refused, and no file is left."""
    graph = StarterGraph()
    control = graph.add("ProbeForeignControl")
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    steered = graph.add("ControlNetApply", conditioning=graph.positive, control_net=control,
                        image=image, strength=1.0)
    graph.add("PixArtSaveEmbeddings", conditioning=steered, filename_prefix="embeddings/control")
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtSaveEmbeddings" and "'control'" in error.message
    assert not list((host.output_dir / "embeddings").glob("control*"))
