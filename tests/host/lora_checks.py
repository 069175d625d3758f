"""LoRA files and graphs that the host tests of LoRAs share."""

from __future__ import annotations

import json
import shutil

import torch
from checks import saved, write
from graphs import Graph

from pixart_core.checkpoint.lora import read_lora
from pixart_core.checkpoint.lora_export import HOST_METADATA, host_tensors

CONFIG = {"pixart_config": json.dumps({"num_heads": 4, "variant": "sigma"})}


def install(host, adapter, kind):
    """The base and the adapter's folder in the models folder: their names there."""
    base = write(host, "diffusion_models", "peft_base.safetensors", adapter.weights, CONFIG)
    folder = host.models_dir / "loras" / f"peft_{kind}"
    if not folder.exists():
        shutil.copytree(adapter.folder, folder)
    return base, f"peft_{kind}/"


def install_converted(host, adapter, kind):
    """The adapter as `pixart convert --lora` writes it."""
    tensors = host_tensors(read_lora(adapter.folder), adapter.weights)
    return write(host, "loras", f"converted_{kind}.safetensors", tensors, HOST_METADATA)


def start(base):
    """A graph and its float32 MODEL."""
    graph = Graph()
    return graph, graph.add("PixArtLoader", model_name=base, weight_dtype="float32")


def ours(graph, model, name, strength=1.0, **inputs):
    return graph.add("PixArtLoRALoader", model=model, lora_name=name, strength=strength, **inputs)


def stock(graph, model, name, strength=1.0):
    return graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def apply(host, graph, model, adapter, name, **inputs):
    """Adds the evaluation of MODEL at the adapter's inputs; `epsilon` reads it after the run."""
    return graph.add("ProbeApplyModel", model=model, name=name,
                     file=host.write_tensors("lora_inputs", adapter.inputs), **inputs)


def epsilon(host, name):
    return saved(host, name, "eps")


def random_lora(weights, names, rank=4, scale=0.1, alpha=6.0):
    """A LoRA with alpha on native modules, in names that ComfyUI knows, too."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        key = f"diffusion_model.{name}"
        out[f"{key}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * scale
        out[f"{key}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * scale
        out[f"{key}.alpha"] = torch.tensor(alpha)
    return out
