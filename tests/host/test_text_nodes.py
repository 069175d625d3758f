"""PixArt Text Encode, T5 Loader and Null Caption against the engine and the stock nodes."""


import pytest
import torch
from checks import choices, parted, relative, save, saved, starter_file
from graphs import MODEL, PROMPT, T5, TOKENS, Graph, StarterGraph
from safetensors.torch import load_file, save_file

import pixart_core as pc
from pixart_core.checkpoint.convert import convert_state_dict
from pixart_core.starter import find_starter

STARTER = find_starter()
LONG = "a small golden lantern on the left, a wide river below it and one bright star. " * 12


def encode(host, text, name="text", clean=True, max_tokens=300, t5=T5, model=False, **loader):
    """(states (1, L, D), what the node shows, the run) of PixArtTextEncode."""
    graph = Graph()
    clip = graph.add("PixArtT5Loader", t5_name=t5, **loader)
    extra = {"model": graph.add("PixArtLoader", model_name=MODEL)} if model else {}
    node = graph.add("PixArtTextEncode", clip=clip, text=text, clean_caption=clean,
                     max_tokens=max_tokens, **extra)
    save(graph, node, name)
    result = host.run(graph)
    return saved(host, name, "value.0.0"), result.text(node), result


@pytest.mark.parametrize(("text", "max_tokens"), [
    (PROMPT, 300), ("", 300), (LONG, 300), (LONG, 120), (PROMPT, 8),
    (PROMPT, 1),
], ids=["short", "empty", "long_300", "long_120", "cut_at_8", "end_alone"])
def test_text_equals_transformers(host, encoder, text, max_tokens):
    """bar: 1e-5 relative in float32. Cut prompts keep the end token, as transformers does."""
    states, report, _ = encode(host, text, clean=False, max_tokens=max_tokens)
    expected, mask = encoder(text, max_tokens=max_tokens)
    expected = expected[:, : int(mask.sum())]
    assert states.shape == expected.shape
    error = relative(states, expected)
    assert error < 1e-5, f"relative error {error:.2e}"
    total = encoder.tokenize(text, max_tokens)[0].total
    assert report.startswith(f"{total} of {max_tokens} tokens" if total <= max_tokens
                             else f"{total} tokens, the limit is {max_tokens}; cut: ")


def test_text_equals_the_stock_node(host):
    """CLIPTextEncode on the same CLIP, bit for bit, where nothing is cleaned or cut."""
    graph = StarterGraph()
    ours = graph.add("PixArtTextEncode", clip=graph.clip, text=PROMPT, clean_caption=False,
                     max_tokens=300)
    stock = graph.add("CLIPTextEncode", clip=graph.clip, text=PROMPT)
    save(graph, ours, "ours")
    save(graph, stock, "stock")
    host.run(graph)
    assert torch.equal(saved(host, "ours", "value.0.0"), saved(host, "stock", "value.0.0"))


def test_token_report(host, encoder):
    """On the node, and as progress text while the workflow runs."""
    _, report, result = encode(host, "a red circle on blue", name="report")
    total = encoder.tokenize("a red circle on blue", 300)[0].total
    assert report == f"{total} of 300 tokens"
    node = result.node_id("PixArtTextEncode")
    assert (node, report) in result.progress_text


def test_the_limit_of_a_connected_model(host):
    """40 for the starter, whatever max_tokens says; a smaller max_tokens still counts."""
    states, report, _ = encode(host, LONG, model=True)
    assert states.shape[1] == TOKENS and f"the limit is {TOKENS}" in report
    states, report, _ = encode(host, LONG, model=True, max_tokens=10)
    assert states.shape[1] == 10 and "the limit is 10" in report


def test_cleaning_changes_the_text(host):
    """As the captions were in training: lower case, no links."""
    shouted = "A LARGE RED CIRCLE https://example.com on a blue background"
    cleaned, _, _ = encode(host, shouted)
    by_hand, _, _ = encode(host, pc.text.clean_caption(shouted), clean=False)
    raw, _, _ = encode(host, shouted, clean=False)
    assert torch.equal(cleaned, by_hand)
    assert raw.shape != cleaned.shape or not torch.equal(raw, cleaned)


def test_prompt_weights_count_without_cleaning(host):
    """The host's (word:1.2) changes that word's states."""
    plain, _, _ = encode(host, "a red circle", clean=False)
    weighted, _, _ = encode(host, "a (red:1.5) circle", clean=False)
    assert weighted.shape == plain.shape and 1e-3 < relative(weighted, plain) < 1.0


def test_size_conditioning_goes_along(host):
    graph = StarterGraph()
    node = graph.encode(PROMPT, width=1024, height=512, aspect_ratio=0.5)
    probe = save(graph, node, "sized")
    values = host.run(graph).json(probe)["values"]
    assert (values["value.0.1.width"], values["value.0.1.height"]) == (1024, 512)
    assert values["value.0.1.aspect_ratio"] == 0.5


def test_t5_folder_and_device(host):
    """A Hugging Face folder is in the list and gives what the single file gives; so does cpu."""
    assert {"t5/", T5} <= set(choices(host, "PixArtT5Loader", "t5_name"))
    expected, _, _ = encode(host, PROMPT)
    assert torch.equal(encode(host, PROMPT, t5="t5/")[0], expected)
    assert torch.equal(encode(host, PROMPT, device="cpu")[0], expected)


def null_caption(host, model, positive=None, name="null", **loader):
    graph = StarterGraph(model=model, **loader)
    extra = {"positive": graph.encode(positive)} if positive is not None else {}
    save(graph, graph.add("PixArtNullCaption", model=graph.model, **extra), name)
    host.run(graph)
    return saved(host, name, "value.0.0")


def test_null_caption_is_that_of_the_file(host):
    """All of its rows, or as many as the prompt has tokens; 8-bit weights do not round it."""
    rows = load_file(STARTER.transformer)["y_embedder.y_embedding"].float()
    assert torch.equal(null_caption(host, MODEL)[0], rows)
    assert torch.equal(null_caption(host, MODEL, weight_dtype="float8_e4m3fn")[0], rows)
    length = encode(host, "a red circle")[0].shape[1]
    assert length < len(rows)
    assert torch.equal(null_caption(host, MODEL, "a red circle")[0], rows[:length])


def test_null_caption_as_negative(host):
    """The starter learned its T5's empty prompt as null caption: both guide to one picture."""
    graph = StarterGraph()
    null = graph.add("PixArtNullCaption", model=graph.model, positive=graph.positive)
    save(graph, graph.ksampler(steps=3, negative=null), "null_negative")
    save(graph, graph.ksampler(steps=3), "empty_negative")
    save(graph, graph.ksampler(steps=3, negative=graph.positive), "no_guidance")
    host.run(graph)
    latent, expected = saved(host, "null_negative"), saved(host, "empty_negative")
    assert relative(latent, expected) < 1e-3
    assert relative(saved(host, "no_guidance"), expected) > 0.05


def test_null_caption_that_is_not_in_the_file(host):
    """diffusers files drop it: the error says so and what to do instead."""
    weights, metadata = starter_file()
    path = host.models_dir / "diffusion_models" / "no_null.safetensors"
    save_file(parted(convert_state_dict(weights, "diffusers")), path, metadata=metadata)
    graph = StarterGraph(model=path.name)
    save(graph, graph.add("PixArtNullCaption", model=graph.model), "no_null")
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtNullCaption"
    assert "no null caption" in error.message and "empty prompt" in error.message


def test_null_caption_of_another_model(host):
    """A one-block SD3, built by the host from its first tensors."""
    shapes = {"joint_blocks.0.context_block.attn.qkv.weight": (192, 64),
              "x_embedder.proj.weight": (64, 16, 2, 2), "pos_embed": (1, 16, 64),
              "context_embedder.weight": (64, 4096), "final_layer.linear.weight": (64, 64),
              "y_embedder.mlp.0.weight": (64, 2048)}
    path = host.models_dir / "diffusion_models" / "sd3.safetensors"
    save_file({f"model.diffusion_model.{k}": torch.zeros(s) for k, s in shapes.items()}, path)
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=path.name, weight_dtype="default")
    save(graph, graph.add("PixArtNullCaption", model=model), "sd3")
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtNullCaption", str(error)
    assert "SD3" in error.message and "PixArt Model Loader" in error.message
