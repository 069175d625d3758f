"""MODEL from a GGUF file: found, drawn with, patched, and refused with a reason."""

import numpy as np
import pytest
import torch
from checks import STARTER, choices, parted, refused, relative, sampled, save, saved, write_bytes
from graphs import MODEL, SMALL, StarterGraph
from PIL import Image
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.checkpoint.gguf_write import write_gguf
from pixart_core.config import METADATA_KEY

pytestmark = pytest.mark.gguf
PROMPT = "a large yellow star on the left on a purple background"
NAME, UNPACKED = "packed/starter_Q4_0.gguf", "starter_unpacked.safetensors"
LORA = "gguf.safetensors"
LAYERS = {"blocks.0.attn.qkv": (576, 192), "blocks.3.mlp.fc1": (768, 192),
          "blocks.5.cross_attn.kv_linear": (384, 192), "y_embedder.y_proj.fc2": (192, 192)}


@pytest.fixture(scope="module")
def files(host):
    """The starter in Q4_0, the same weights unpacked, and a LoRA for both."""
    path = host.models_dir / "diffusion_models" / NAME
    path.parent.mkdir(exist_ok=True)
    weights, config = pc.open_transformer(STARTER.transformer)
    write_gguf(path, weights, config, "Q4_0")
    unpacked, _ = pc.open_transformer(path)
    pc.write_checkpoint(host.models_dir / "diffusion_models" / UNPACKED, unpacked,
                        {METADATA_KEY: config.to_json()})
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, (rows, columns) in LAYERS.items():
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        lora[f"diffusion_model.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, 4,
                                                                          generator=generator)
    save_file(parted(lora), host.models_dir / "loras" / LORA)
    return path


def latents(host, model, name, change=None, prompt=PROMPT, **settings):
    """Latents of 3 steps; `change` puts nodes behind the loader."""
    graph = StarterGraph(model=model, prompt=prompt)
    if change is not None:
        change(graph)
    save(graph, graph.ksampler(steps=3, seed=5, **settings), name)
    host.run(graph)
    return saved(host, name)


def lora(graph, strength=1.0):
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=LORA,
                            strength_model=strength)


def test_listed_without_changing_the_hosts_lists(host, files):
    assert NAME in choices(host, "PixArtLoader", "model_name")
    assert NAME not in choices(host, "UNETLoader", "unet_name")


def test_same_picture_as_the_engine(host, files):
    alone = pc.Pipeline.from_files(files, STARTER.t5_file, STARTER.vae, dtype=torch.float32,
                                   device="cpu").generate(PROMPT, steps=8, seed=7, **SMALL)
    graph = StarterGraph(model=NAME, prompt=PROMPT)
    image = graph.picture(graph.ksampler(seed=7, steps=8))
    workflow = host.picture(host.run(graph).images(image)[0])
    assert isinstance(alone, Image.Image)
    assert np.abs(np.asarray(workflow, np.int16) - np.asarray(alone, np.int16)).max() <= 1


def test_lora_is_applied_to_the_unpacked_weights(host, files):
    """As on the unpacked file; and taken off again for the next graph."""
    bare = latents(host, NAME, "bare")
    packed = latents(host, NAME, "packed", lora)
    dense = latents(host, UNPACKED, "dense", lora)
    assert relative(packed, bare) > 0.05
    assert relative(packed, dense) < 1e-4
    original = latents(host, MODEL, "original", lora)
    without = latents(host, MODEL, "without")
    assert relative(packed, original) < 1.5 * relative(bare, without)
    assert torch.equal(latents(host, NAME, "again", prompt=PROMPT + " "), bare)


def test_two_loras_and_a_strength(host, files):
    def both(graph):
        lora(graph, 0.5)
        lora(graph, -0.25)

    packed, dense = (latents(host, m, "two", both) for m in (NAME, UNPACKED))
    assert relative(packed, dense) < 1e-4


def test_lora_as_a_hook(host, files):
    """On one prompt alone, in a part of the steps."""
    def hook(graph):
        hooks = graph.add("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
        graph.positive = graph.add("ConditioningSetProperties", cond_NEW=graph.positive,
                                   hooks=hooks, strength=1.0, set_cond_area="default")

    packed, dense = (latents(host, m, "hook", hook) for m in (NAME, UNPACKED))
    assert relative(packed, dense) < 1e-4
    assert relative(packed, latents(host, NAME, "unhooked")) > 0.02


@pytest.mark.parametrize("packed_first", [True, False])
def test_merging(host, files, packed_first):
    def merge(first, second):
        def change(graph):
            other = graph.add("PixArtLoader", model_name=second)
            graph.model = graph.add("ModelMergeSimple", model1=graph.model, model2=other,
                                    ratio=0.5)
        return latents(host, first, "merged", change)

    names = [(NAME, MODEL), (UNPACKED, MODEL)] if packed_first else \
        [(MODEL, NAME), (MODEL, UNPACKED)]
    packed, dense = (merge(*pair) for pair in names)
    assert relative(packed, dense) < 1e-4


def test_saving_says_what_to_do(host, files):
    graph = StarterGraph(model=NAME)
    graph.add("ModelSave", model=graph.model, filename_prefix="packed")
    refused(host, graph, "quantised file", "pixart convert", kind="execution")


def test_bad_files_are_refused_before_the_graph_runs(host, files, lives_on):
    content = files.read_bytes()
    for name, part, words in (("cut.gguf", content[:-5000], "cut short"),
                              ("page.gguf", b"<html>", "web page")):
        write_bytes(host, "diffusion_models", name, part)
        graph, loader = sampled(name)
        refused(host, graph, name, words, node=loader)
