"""`text_cache` of PixArt T5 Loader: a repeated prompt loads no T5, a changed encoder asks it."""

import json
import os

import pytest
import torch
from checks import STARTER, save, saved
from graphs import TOKENS, Graph
from safetensors import safe_open
from test_clip_hooks import add_lora

NAME, PROMPT = "cached_t5.safetensors", "a large red circle on a blue background"


@pytest.fixture
def file(host):
    """A T5 of its own: the starter's file, new in every test."""
    path = host.models_dir / "text_encoders" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(STARTER.t5_file.read_bytes())
    return path


def folder(host):
    return host.base / "user" / "__pixart_delta" / "text_cache"


def entries(host):
    return set(folder(host).glob("*.safetensors"))


def encoder(graph, text_cache=True, **inputs):
    return graph.add("PixArtT5Loader", t5_name=NAME, text_cache=text_cache, **inputs)


def run(host, name, prompt=PROMPT, node="PixArtTextEncode", **loader):
    """The states of one prompt from a run in which the host remembers no node."""
    host.free()
    graph = Graph()
    clip = encoder(graph, **loader)
    own = {} if node == "CLIPTextEncode" else {"clean_caption": False, "max_tokens": TOKENS}
    save(graph, graph.add(node, clip=clip, text=prompt, **own), name)
    host.run(graph)
    return saved(host, name, "value.0.0")


def spoil(path):
    """NaN in place of every weight, in a file that looks untouched: to read one is to fail."""
    before = path.stat()
    with safe_open(path, "pt") as opened:
        spiece = bytes(opened.get_tensor("spiece_model").tolist())
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    first, last = header["spiece_model"]["data_offsets"]
    content[start:] = b"\xff" * (len(content) - start)
    content[start + first: start + last] = spiece
    path.unlink()  # who maps the old one keeps it
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_repeated_prompt_reads_no_weight(host, file):
    first = run(host, "cache_first")
    spoil(file)
    assert torch.equal(run(host, "cache_again"), first)
    assert torch.equal(run(host, "cache_stock", node="CLIPTextEncode"), first)
    with pytest.raises(AssertionError, match="not finite"):
        run(host, "cache_other", prompt="a small green square")


def test_cached_states_are_those_of_a_plain_clip(host, file):
    plain = run(host, "cache_plain", text_cache=False)
    assert torch.equal(run(host, "cache_made"), plain)
    assert torch.equal(run(host, "cache_found"), plain)


def test_precisions_have_entries_of_their_own(host, file):
    run(host, "cache_auto")
    before = entries(host)
    run(host, "cache_bf16", precision="bf16")
    assert len(entries(host) - before) == 1


def test_the_prompt_is_not_in_the_files(host, file):
    run(host, "cache_private", prompt="zebracrossing")
    assert entries(host) and not any(b"zebra" in path.read_bytes() for path in entries(host))


def test_changed_encoders_leave_it_aside(host, file):
    """LoRAs, hooks, another layer: what they give is neither taken from the cache nor put there."""
    plain = run(host, "cache_unchanged")
    before = entries(host)
    host.free()
    graph = Graph()
    clip = encoder(graph)
    name = add_lora(host, plain.shape[-1])
    hook = graph.add("CreateHookLora", lora_name=name, strength_model=0.0, strength_clip=1.0)
    model = graph.add("PixArtLoader", model_name=STARTER.transformer.name)
    changed = {
        "lora": graph.add("LoraLoader", model=model, clip=clip, lora_name=name,
                          strength_model=0.0, strength_clip=1.0)[1],
        "hook": graph.add("SetClipHooks", clip=clip, hooks=hook, apply_to_conds=True,
                          schedule_clip=False),
        "layer": graph.add("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)}
    for label, chosen in changed.items():
        text = graph.add("PixArtTextEncode", clip=chosen, text=PROMPT, clean_caption=False,
                         max_tokens=TOKENS)
        save(graph, text, f"cache_{label}")
    host.run(graph)
    for label in changed:
        states = saved(host, f"cache_{label}", "value.0.0")
        assert not torch.allclose(states, plain, rtol=1e-2, atol=1e-3), label
    assert entries(host) == before


def test_options_of_the_tokenizer_are_another_prompt(host, file):
    run(host, "cache_unpadded", node="CLIPTextEncode")
    host.free()
    graph = Graph()
    padded = graph.add("T5TokenizerOptions", clip=encoder(graph), min_padding=0, min_length=20)
    save(graph, graph.add("CLIPTextEncode", clip=padded, text=PROMPT), "cache_padded")
    host.run(graph)
    assert saved(host, "cache_padded", "value.0.0").shape[1] == 20


def test_off_keeps_nothing(host, file):
    before = entries(host)
    run(host, "cache_off", prompt="a yellow star", text_cache=False)
    assert entries(host) == before
