"""What `pixart train` writes, in the host: the same prediction as in the engine, from each file.

Runs are two steps on a tiny model of random weights; that they learn is tested elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checks import relative, save, saved
from graphs import Graph
from PIL import Image
from safetensors.torch import load_file

import pixart_core as pc
from pixart_core.config import LATENT_SCALE
from pixart_core.training.loop import train
from pixart_core.training.recipes import make_recipe, recipe_settings
from pixart_core.vae import load_vae

sys.path.append(str(Path(__file__).parents[1] / "core"))
from training_samples import MemorySamples, start, write_model

BAR = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def base(folder):
    """The file of the model that runs begin with."""
    return write_model(folder / "trained_from.safetensors")


@pytest.fixture(scope="module")
def inputs():
    """Two latents, timesteps and captions of unequal length for the tiny model."""
    g = torch.Generator().manual_seed(8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return {"x": torch.randn(2, 4, 8, 12, generator=g), "timestep": torch.tensor([999.0, 259.0]),
            "caption": torch.randn(2, 5, 24, generator=g) * mask[..., None], "caption_mask": mask,
            "control_latent": torch.randn(2, 4, 8, 12, generator=g)}


def trained(folder, name, base, **changes):
    """The file that two steps of a recipe leave, under a name of its own."""
    path, = train(start(name, folder / name, base, steps=2, learning_rate=3e-2, warmup_steps=0,
                        **changes)).files
    return path.rename(path.with_name(f"trained_{name.replace('-', '_')}.safetensors"))


@torch.no_grad()
def engine(model, inputs, **control):
    return model(inputs["x"], inputs["timestep"], inputs["caption"],
                 inputs.get("caption_mask"), **control)[:, :4]


def loader(graph, host, path):
    """PixArtLoader of a file that is put into the host's models, in float32."""
    return graph.add("PixArtLoader", model_name=host.add_model("diffusion_models", path),
                     weight_dtype="float32")


def probe(graph, host, model, inputs, name, **more):
    graph.add("ProbeApplyModel", model=model, name=name,
              file=host.write_tensors("trained_inputs", inputs), **more)


def epsilon(host, name):
    return saved(host, name, "eps")


@pytest.mark.parametrize("name", ["base", "lcm"])
def test_a_trained_model_in_our_loader(host, name, folder, base, inputs):
    """Protects the hand-over of whole models, which training moved from where they began."""
    path = trained(folder, name, base)
    graph = Graph()
    probe(graph, host, loader(graph, host, path), inputs, name)
    host.run(graph)
    expected = engine(pc.load_transformer(path), inputs)
    assert relative(engine(pc.load_transformer(base), inputs), expected) > 100 * BAR
    assert relative(epsilon(host, name), expected) < BAR


def test_a_trained_model_in_the_stock_loader(host, folder):
    """Protects native names: ComfyUI's own PixArt, which knows one width, reads the same file."""
    fields = {"hidden_size": 1152, "num_heads": 16, "depth": 1, "mlp_hidden_size": 4608,
              "caption_channels": 4096, "max_tokens": 300}
    begin = write_model(folder / "trained_wide_from.safetensors", **fields)
    weights = {name: 0.1 * t for name, t in load_file(begin).items()}
    pc.write_checkpoint(begin, weights, {"pixart_config": pc.PixArtConfig(**fields).to_json()})
    samples = MemorySamples(count=2, channels=4096)
    path, = train(start("base", folder / "wide", begin, samples, steps=1, batch_size=1,
                        ema_decay=None, learning_rate=1e-3, warmup_steps=0)).files
    path = path.rename(path.with_name("trained_wide.safetensors"))
    g = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(1, 4, 64, 64, generator=g), "timestep": torch.tensor([500.0]),
              "caption": torch.randn(1, 5, 4096, generator=g)}
    graph = Graph()
    stock = graph.add("UNETLoader", unet_name=host.add_model("diffusion_models", path),
                      weight_dtype="default")
    probe(graph, host, stock, inputs, "stock")
    probe(graph, host, loader(graph, host, path), inputs, "ours")
    host.run(graph)
    expected = engine(pc.load_transformer(path), inputs)
    assert relative(engine(pc.load_transformer(begin), inputs), expected) > 1e-3
    assert relative(epsilon(host, "ours"), expected) < BAR
    assert relative(epsilon(host, "stock"), expected) < 1e-4


@pytest.mark.parametrize(("name", "changes"), [
    ("lora", {"class_data": "class", "alpha": 5.0}), ("lcm-lora", {})])
def test_a_trained_lora_in_our_loader_and_the_stock_one(host, name, changes, folder, base, inputs):
    """Protects names and alpha of the file: both nodes do what the engine does with it."""
    path = trained(folder, name, base, **changes)
    graph = Graph()
    model = loader(graph, host, base)
    lora = host.add_model("loras", path)
    probe(graph, host, graph.add("PixArtLoRALoader", model=model, lora_name=lora, strength=0.7),
          inputs, "ours")
    probe(graph, host, graph.add("LoraLoaderModelOnly", model=model, lora_name=lora,
                                 strength_model=0.7), inputs, "stock")
    host.run(graph)
    plain, adapted = pc.load_transformer(base), pc.load_transformer(base)
    pc.apply_lora(adapted, path, strength=0.7)
    expected = engine(adapted, inputs)
    assert relative(engine(plain, inputs), expected) > 100 * BAR
    assert relative(epsilon(host, "ours"), expected) < BAR
    assert relative(epsilon(host, "stock"), expected) < BAR


def test_a_trained_controlnet_in_our_loader(host, folder, base, inputs):
    """Protects the ControlNet's file: it steers the model that it was trained beside."""
    path = trained(folder, "controlnet", base)
    graph = Graph()
    file = host.write_tensors("trained_inputs", inputs)
    text = graph.add("ProbeLoadConditioning", file=host.write_tensors(
        "trained_text", {k: inputs[k] for k in ("caption", "caption_mask")}))
    steered = graph.add(
        "PixArtControlNetApply", positive=text, strength=0.8, start_percent=0.0, end_percent=1.0,
        control_net=graph.add("PixArtControlNetLoader", weight_dtype="float32",
                              control_net_name=host.add_model("controlnet", path)),
        vae=graph.add("ProbeLatentVAE", file=file, scale=LATENT_SCALE["sigma"], label="trained"),
        image=graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0))
    probe(graph, host, loader(graph, host, base), inputs, "steered", positive=steered[0])
    host.run(graph)
    model = pc.load_transformer(base)
    control = pc.Control(pc.load_controlnet(path, base=model.config), inputs["control_latent"], 0.8)
    expected = engine(model, inputs, control=[control])
    assert relative(engine(model, inputs), expected) > 100 * BAR
    assert relative(epsilon(host, "steered"), expected) < BAR


def test_a_trained_vae_in_the_stock_loader(host, folder):
    """Protects names and scale of the VAE's file: both ways, in the host's terms of latents."""
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.effect_noise((48, 48), 60).convert("RGB").save(pictures / "a.png")
    settings = recipe_settings("vae", {"out": folder / "vae", "data": pictures, "crop": 16,
                                       "batch_size": 1, "steps": 1, "sample_every": 0})
    path, = train(make_recipe("vae", settings)).files
    path = path.rename(path.with_name("trained_vae.safetensors"))
    vae = load_vae(path, "alpha")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = vae.decode(latents)
    scaled = {"samples": latents / LATENT_SCALE["alpha"]}
    graph = Graph()
    node = graph.add("VAELoader", vae_name=host.add_model("vae", path))
    decoded = graph.add("VAEDecode", vae=node, samples=graph.add(
        "ProbeLoadLatent", file=host.write_tensors("trained_latent", scaled)))
    save(graph, decoded, "decoded")
    save(graph, graph.add("VAEEncode", vae=node, pixels=decoded), "encoded")
    host.run(graph)
    shown = saved(host, "decoded", "value").permute(0, 3, 1, 2)
    assert image.std() > 0.01 and (shown - image).abs().max() < 1e-4
    again = vae.encode(shown) / LATENT_SCALE["alpha"]
    assert relative(saved(host, "encoded"), again) < 1e-4
