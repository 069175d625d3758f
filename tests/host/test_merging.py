"""Merged and saved by the host's own nodes, and back through our loader: bit for bit."""

import json

import pytest
import torch
from checks import relative, save, saved, write
from graphs import LCM, MODEL, StarterGraph
from safetensors import safe_open
from safetensors.torch import load_file

from pixart_core.checkpoint.read import read_checkpoint
from pixart_core.config import METADATA_KEY, PixArtConfig
from pixart_core.load import read_transformer
from pixart_core.model.transformer import PixArtTransformer
from pixart_core.starter import find_starter

STARTER = find_starter()


def small_weights(**fields):
    """Random weights of a small model, and its config."""
    config = PixArtConfig(**{"hidden_size": 48, "depth": 2, "num_heads": 4, "mlp_hidden_size": 96,
                             "caption_channels": 64, **fields})
    model = PixArtTransformer(config, device="meta")
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.2
            for name, tensor in model.state_dict().items()}, config


def saved_by_host(host, name, build):
    """The path of the file that a save node writes for the model of `build(graph)`."""
    graph = StarterGraph()
    build(graph, f"merged/{name}")
    host.run(graph)
    path, = (host.output_dir / "merged").glob(f"{name}_*.safetensors")
    return path


def latents(host, model, name):
    graph = StarterGraph(model=model)
    save(graph, graph.ksampler(steps=3), name)
    host.run(graph)
    return saved(host, name)


def into_models(host, path, folder="diffusion_models"):
    return host.add_model(folder, path)


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeBlocks"])
def test_a_merge_saved_and_loaded_draws_the_same(host, node):
    """Half of one model and half of the other, with the tables of every block."""
    ratios = ({"ratio": 0.5} if node == "ModelMergeSimple"
              else {"input": 0.5, "middle": 0.5, "out": 0.5})

    def build(graph, prefix):
        other = graph.add("PixArtLoader", model_name=LCM)
        merged = graph.add(node, model1=graph.model, model2=other, **ratios)
        save(graph, graph.ksampler(model=merged, steps=3), node)
        graph.add("ModelSave", model=merged, filename_prefix=prefix)

    path = saved_by_host(host, node, build)
    one, other = load_file(STARTER.transformer), load_file(STARTER.lcm)
    found = read_transformer(path, {}).state_dict
    for name, tensor in found.items():
        middle = (one[name].float() + other[name].float()) / 2
        assert torch.allclose(tensor.float(), middle, rtol=2e-3, atol=2e-3), name
    name = into_models(host, path)
    assert torch.equal(latents(host, name, "again"), saved(host, node))


def test_a_whole_checkpoint_comes_back(host):
    """CheckpointSave bundles T5 and VAE; our loader takes the transformer out of it."""
    def build(graph, prefix):
        graph.add("CheckpointSave", model=graph.model, clip=graph.clip, vae=graph.vae,
                  filename_prefix=prefix)

    path = saved_by_host(host, "whole", build)
    name = into_models(host, path)
    assert torch.equal(latents(host, name, "whole"), latents(host, MODEL, "single"))


@pytest.mark.parametrize("fields", [
    {"num_heads": 3}, {"variant": "alpha", "image_size": 256, "base_size": 16,
                       "pe_interpolation": 1.0, "max_tokens": 120},
    {"num_heads": 6, "distilled": "lcm"},
], ids=["heads", "positions", "distilled"])
def test_what_shapes_do_not_tell_is_kept(host, fields):
    """Heads, positions, variant and distillation of a model that ModelSave wrote."""
    weights, config = small_weights(**fields)
    file = f"small_{config.num_heads}_{config.variant}.safetensors"
    write(host, "diffusion_models", file, weights, {METADATA_KEY: config.to_json()})

    def build(graph, prefix):
        model = graph.add("PixArtLoader", model_name=file)
        graph.add("ModelSave", model=model, filename_prefix=prefix)

    path = saved_by_host(host, file.split(".")[0], build)
    opened = read_transformer(path, {})
    assert opened.config == config
    assert {k: v.shape for k, v in opened.state_dict.items()} == {
        k: v.shape for k, v in weights.items()}
    name = into_models(host, path)
    graph = StarterGraph(model=name)
    graph.add("ProbeModelInfo", model=graph.model)
    assert "PixArtModel" in host.run(graph).json("ProbeModelInfo")["model"]


def test_the_stock_loader_takes_the_file(host):
    """UNETLoader on a saved model of width 1152: the host's own PixArt, all of its weights."""
    weights, config = small_weights(hidden_size=1152, num_heads=16, mlp_hidden_size=4608, depth=1,
                                    caption_channels=4096)
    write(host, "diffusion_models", "wide.safetensors", {k: v.half() for k, v in weights.items()},
          {METADATA_KEY: config.to_json()})

    def build(graph, prefix):
        model = graph.add("PixArtLoader", model_name="wide.safetensors")
        graph.add("ModelSave", model=model, filename_prefix=prefix)

    name = into_models(host, saved_by_host(host, "wide", build))
    caption = host.write_tensors("wide", {"embeds": torch.randn(1, 4, 4096)})
    results = []
    for loader in ({"class": "UNETLoader", "unet_name": name, "weight_dtype": "default"},
                   {"class": "PixArtLoader", "model_name": name}):
        graph = StarterGraph(width=320, height=320)  # its PixArt divides by zero up to 256
        model = graph.add(loader.pop("class"), **loader)
        graph.add("ProbeModelInfo", model=model)
        positive = graph.add("ProbeLoadConditioning", file=caption)
        save(graph, graph.ksampler(model=model, steps=1, cfg=1.0, positive=positive,
                                   negative=positive), "wide_latent")
        info = host.run(graph).json("ProbeModelInfo")
        results.append((info, saved(host, "wide_latent")))
    (stock, theirs), (own, ours) = results
    assert stock["network"].endswith("PixArtMS") and own["network"].endswith("HostTransformer")
    assert theirs.isfinite().all() and relative(theirs, ours) < 0.5, relative(theirs, ours)


def test_the_config_tensor_is_the_config(host):
    """What the file holds: the JSON of the config as bytes, beside the weights."""
    def build(graph, prefix):
        graph.add("ModelSave", model=graph.model, filename_prefix=prefix)

    path = saved_by_host(host, "plain", build)
    with safe_open(path, "pt") as file:
        assert METADATA_KEY not in (file.metadata() or {})
        stored = json.loads(bytes(file.get_tensor(METADATA_KEY).tolist()))
    header = json.loads(read_checkpoint(STARTER.transformer).metadata[METADATA_KEY])
    assert stored["num_heads"] == header["num_heads"] and stored["variant"] == header["variant"]
