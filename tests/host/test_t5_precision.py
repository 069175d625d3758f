"""`precision` of PixArt T5 Loader: states, files written once, memory, clear errors."""

import json
import os
import subprocess

import pytest
import torch
from checks import STARTER, encoded, refused, relative, require_kitchen, save, saved
from graphs import T5, TOKENS, Graph, StarterGraph

from pixart_core.checkpoint.write_stream import stream_checkpoint
from pixart_core.text import T5TextEncoder
from pixart_core.text.t5_file import T5Config, expected_shapes, read_t5
from pixart_core.text.t5_quant_file import write_quantized_t5

PROMPT = "a large red circle on a blue background"
QUANTIZED = ("fp8", "int8", "int4")


@pytest.fixture(scope="module")
def written(host):
    """The starter's T5 as `pixart quantize` writes it: {method: name in the host}."""
    names = {}
    for method in QUANTIZED:
        names[method] = f"t5_starter_{method}.safetensors"
        write_quantized_t5(STARTER.t5_file, host.models_dir / "text_encoders" / names[method],
                           method)
    return names


@pytest.fixture(autouse=True)
def _kitchen(installation):
    require_kitchen(installation)


def states(host, loaders, prompt=PROMPT):
    """The states that CLIPs of PixArt T5 Loader give: {name: (L, D)}, in one run."""
    graph = Graph()
    for name, inputs in loaders.items():
        clip = graph.add("PixArtT5Loader", **{"t5_name": T5, **inputs})
        text = graph.add("PixArtTextEncode", clip=clip, text=prompt, clean_caption=True,
                         max_tokens=TOKENS)
        save(graph, text, f"precision_{name}")
    host.run(graph)
    return {name: saved(host, f"precision_{name}", "value.0.0")[0] for name in loaders}


def test_states_equal_the_engines(host):
    precisions = ("auto", "bf16", "fp16", *QUANTIZED)
    found = states(host, {name: {"precision": name} for name in precisions})
    for precision, caption in found.items():
        engine = T5TextEncoder.from_path(STARTER.t5_file, torch.float32, precision=precision)
        assert relative(caption, engine.states(PROMPT, TOKENS)) < 5e-3, precision
    for name in ("bf16", *QUANTIZED):
        assert relative(found[name], found["auto"]) > 1e-4, f"{name} changes nothing"


def test_files_written_once_are_the_same(host, written):
    """On the card of a user nothing may depend on where the rounding was done."""
    loaders = {f"load_{m}": {"precision": m} for m in QUANTIZED}
    loaders |= {f"file_{m}": {"t5_name": name} for m, name in written.items()}
    found = states(host, loaders)
    for method in QUANTIZED:
        assert relative(found[f"file_{method}"], found[f"load_{method}"]) < 1e-6, method


def test_on_the_cpu(host):
    found = states(host, {"default": {"precision": "int8"},
                          "cpu": {"precision": "int8", "device": "cpu"}})
    assert torch.equal(found["default"], found["cpu"])


def test_unloaded_and_loaded_again(host):
    """The host takes an int8 encoder out of memory for a picture, and back for the next prompt."""
    graph, clip = encoded(T5)
    graph.prompt[clip.id]["inputs"]["precision"] = "int8"
    first = graph.encode("a small green square")
    save(graph, first, "before_unloading")
    host.run(graph)
    host.free(unload_models=True, free_memory=False)
    again = graph.encode("a small green square", width=64, height=64)  # the clip is still cached
    save(graph, again, "after_unloading")
    result = host.run(graph)
    assert result.was_cached(clip) and result.ran(again)
    assert torch.equal(saved(host, "before_unloading", "value.0.0"),
                       saved(host, "after_unloading", "value.0.0"))


def test_a_picture(host):
    latents = {}
    for precision in ("auto", "int8"):
        graph = StarterGraph(prompt=PROMPT)
        graph.clip = graph.add("PixArtT5Loader", t5_name=T5, precision=precision)
        graph.positive, graph.negative = graph.encode(PROMPT), graph.encode("")
        save(graph, graph.ksampler(steps=3), f"picture_{precision}")
        host.run(graph)
        latents[precision] = saved(host, f"picture_{precision}")
    assert 0 < relative(latents["int8"], latents["auto"]) < 5e-2


def test_quantised_files_are_not_quantised_again(host, written):
    graph, loader = encoded(written["int8"])
    graph.prompt[loader.id]["inputs"]["precision"] = "int4"
    refused(host, graph, written["int8"], "quantised already", "int8_tensorwise", "auto",
            node=loader)


def test_unknown_precisions(host):
    graph, loader = encoded(T5)
    graph.prompt[loader.id]["inputs"]["precision"] = "int3"
    result = host.run(graph, ok=False)
    assert result.status != "success" and "int3" in str(result.error)


def test_the_stock_loader_reads_our_8_bit_files(installation, repository, tmp_path):
    """T5 XXL's layers, narrow, through ComfyUI's own load_clip: int8 and fp8 with comfy_quant."""
    quant = installation.path / "comfy" / "quant_ops.py"
    if not quant.is_file() or '"int8_tensorwise"' not in quant.read_text():
        pytest.skip("this ComfyUI has no int8 weights")
    # ComfyUI knows T5 XXL by the height of one matrix of block 23
    config = T5Config(d_model=64, d_kv=16, d_ff=10240, num_layers=24, num_heads=4,
                      vocab_size=32128)
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(config)
    plain = tmp_path / "narrow.safetensors"
    stream_checkpoint(plain, ((name, (torch.randn(shape, generator=generator) * 0.05).half())
                              for name, shape in shapes.items()), {}, 300 * len(shapes))
    files = {}
    for method in ("int8", "fp8"):
        files[method] = str(tmp_path / f"{method}.safetensors")
        write_quantized_t5(plain, files[method], method)
    run = subprocess.run(
        [installation.python, repository / "tests" / "host" / "stock_quantized_t5.py",
         installation.path, json.dumps(files), str(tmp_path)], cwd=tmp_path, timeout=300,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")},
        capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    ids = [found["ids"]]
    for method, path in files.items():
        file = read_t5(path, torch.float32)
        stock = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert found[method]["quantized"] == len(file.packed) == 24 * 7
        assert relative(stock[0], engine_states(file, ids)) < 2e-3, method


def engine_states(file, ids):
    from pixart_core.text.encoder import build_encoder

    model = build_encoder(file)
    return model(input_ids=torch.tensor(ids)).last_hidden_state[0]


@pytest.mark.parametrize("text_cache", [False, True])
def test_the_loader_shows_what_runs_the_layers(host, text_cache):
    """With the cache once a prompt needs them; ComfyUI computes T5 in float32."""
    host.free()
    graph = StarterGraph()
    graph.clip = graph.add("PixArtT5Loader", t5_name=T5, precision="int4", text_cache=text_cache)
    save(graph, graph.encode(f"{PROMPT}, shown {text_cache}"), "shown")
    shown = [text for node, text in host.run(graph).progress_text if node == graph.clip.id]
    assert any("layers in awq_w4a16: unpacked" in text and "float32" in text for text in shown)
