"""LoRAs on quantised models in the host: by our node and the stock one, never rounded again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import STARTER, parted, refused, relative, save, saved
from graphs import MODEL, SMALL, TRAINED, StarterGraph
from safetensors.torch import load_file, save_file

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.quant import file_tensors
from pixart_core.quant.policy import METHODS, behind_gelu, transformer_layers

sys.path.append(str(Path(__file__).parents[1] / "core"))
from quant_layers import quantized

PROMPT = "a large yellow star on the left on a purple background"
LORA, DORA = "quantized.safetensors", "quantized_dora.safetensors"
LAYERS = ("blocks.0.attn.qkv", "blocks.3.mlp.fc1", "blocks.4.mlp.fc2", "blocks.5.cross_attn.proj",
          "blocks.2.cross_attn.kv_linear")


@pytest.fixture(scope="module")
def files(host):
    """The starter in three formats, and LoRAs in two layouts."""
    weights, config = pc.open_transformer(STARTER.transformer)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    generator = torch.Generator().manual_seed(0)
    other = {name: t.float() + 0.1 * t.float().std() * torch.randn(t.shape, generator=generator)
             if t.numel() > 1 else t.float() for name, t in weights.items()}
    folder, header = host.models_dir / "diffusion_models", {METADATA_KEY: config.to_json()}
    save_file(parted(other), folder / f"other_{MODEL}", header)
    for prefix, tensors in (("", weights), ("other_", other)):
        for method in ("svdquant", "int8", "int4"):
            save_file(parted(in_format(method, tensors, shapes)),
                      folder / f"{prefix}{method}.safetensors", header)
    generator.manual_seed(0)
    lora = {}
    for name in LAYERS:
        rows, columns = shapes[f"{name}.weight"]
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        lora[f"diffusion_model.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, 4,
                                                                          generator=generator)
    save_file(parted(lora), host.models_dir / "loras" / LORA)
    rows = shapes["blocks.0.attn.qkv.weight"][0] // 3
    split = {  # diffusers' layout: a factor of its own for each of q, k and v
        f"transformer.transformer_blocks.0.attn1.{part}.lora_{side}.weight":
            torch.randn(3 if side == "A" else rows, 192 if side == "A" else 3,
                        generator=generator) * (1 if side == "A" else 0.2)
        for part in ("to_q", "to_k", "to_v") for side in "AB"}
    save_file(parted(split), host.models_dir / "loras" / "split.safetensors")
    return host.models_dir


def in_format(method, weights, shapes):
    """The tensors of a quantised file; SVDQuant's layers behind the GELU are unsigned ones."""
    stored, plain = {}, dict(weights)
    for name in transformer_layers(shapes, METHODS[method]):
        unsigned = method == "svdquant" and behind_gelu(name)
        one = stored[name] = quantized(method, plain.pop(name).float(), unsigned=unsigned)
        bias = f"{name.removesuffix('weight')}bias"
        shift = one.format.dense_bias(one.tensors, torch.zeros(one.shape[0]))
        plain[bias] = (plain[bias].float() - shift).to(plain[bias].dtype)
    return plain | file_tensors(stored)


def latents(host, model, name, change=None, **settings):
    """Latents of 3 steps; `change` puts nodes behind the loader."""
    graph = StarterGraph(model=model, prompt=PROMPT, **TRAINED)
    if change is not None:
        change(graph)
    save(graph, graph.ksampler(steps=3, seed=5, **settings), name)
    host.run(graph)
    return saved(host, name)


def stock(graph, strength=1.0, name=LORA):
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name,
                            strength_model=strength)


def ours(graph, strength=1.0, name=LORA):
    graph.model = graph.add("PixArtLoRALoader", model=graph.model, lora_name=name,
                            strength=strength)


@pytest.fixture(params=["svdquant", "int8", "int4"])
def model(request, files):
    return f"{request.param}.safetensors"


@pytest.mark.parametrize("load", [stock, ours])
def test_a_lora_changes_what_it_changes_in_the_dense_model(host, model, load):
    """Within the error of the format; and it is gone with the next graph, to the bit."""
    bare, dense_bare = latents(host, model, "bare"), latents(host, MODEL, "dense_bare")
    changed, dense = (latents(host, m, "changed", load) for m in (model, MODEL))
    assert relative(changed, bare) > 0.05
    assert relative(changed, dense) < 2 * relative(bare, dense_bare)
    assert torch.equal(latents(host, model, "again", lambda g: None), bare)


def test_the_picture_is_that_of_the_engine(host, files):
    """Both run the change as a branch beside the stored weight.

    Formats that round activations take a hair's difference to another level: only one that rounds
    weights alone can be compared so closely.
    """
    model = "int4.safetensors"
    engine = pc.load_transformer(files / "diffusion_models" / model, dtype=torch.float32)
    pc.apply_lora(engine, files / "loras" / LORA, 0.7)
    pipeline = pc.Pipeline.from_files(files / "diffusion_models" / model, STARTER.t5_file,
                                      STARTER.vae, dtype=torch.float32, device="cpu")
    pipeline.transformer = engine
    alone = pipeline.generate(PROMPT, steps=4, seed=5, **SMALL)
    graph = StarterGraph(model=model, prompt=PROMPT)
    ours(graph, 0.7)
    image = graph.picture(graph.ksampler(steps=4, seed=5))
    workflow = host.picture(host.run(graph).images(image)[0])
    a, b = (np.asarray(picture, np.int16) for picture in (alone, workflow))
    assert np.abs(a - b).max() <= 1


def test_strengths_add_up_over_split_and_fused_layouts(host, model):
    """q, k and v with factors of their own; half and half again is the whole.

    Exactly so with rounded weights alone; rounded activations jump, by less than their error.
    """
    whole = latents(host, model, "whole", lambda g: ours(g, 1.0, "split.safetensors"))
    halves = latents(host, model, "halves",
                     lambda g: (ours(g, 0.5, "split.safetensors"),
                                stock(g, 0.5, "split.safetensors")))
    dense = latents(host, MODEL, "dense", lambda g: ours(g, 1.0, "split.safetensors"))
    error = relative(whole, dense)
    assert relative(dense, latents(host, MODEL, "dense_bare")) > error > 0
    assert relative(halves, whole) < (1e-3 if model.startswith("int4") else error)


def test_a_hook_and_a_merge_reach_a_quantised_model(host, model):
    """A hook is a LoRA of some steps; a merge is no low rank and unpacks the layers it changes."""
    def hook(graph):
        hooks = graph.add("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
        graph.positive = graph.add("ConditioningSetProperties", cond_NEW=graph.positive,
                                   hooks=hooks, strength=1.0, set_cond_area="default")

    def merge(graph):
        other = graph.add("PixArtLoader", model_name=MODEL)
        graph.model = graph.add("ModelMergeSimple", model1=graph.model, model2=other, ratio=0.0)

    hooked, dense = (latents(host, m, "hook", hook) for m in (model, MODEL))
    bare, dense_bare = latents(host, model, "bare"), latents(host, MODEL, "dense_bare")
    assert relative(hooked, bare) > 0.02
    assert relative(hooked, dense) < 2 * relative(bare, dense_bare)
    assert relative(latents(host, model, "merged", merge), dense_bare) < 1e-3


@pytest.mark.parametrize("second", ["svdquant", "16 bits"])
def test_a_merge_of_quantised_models_is_that_of_the_dense_ones(host, model, second):
    """Of weights and biases as they are meant: not of scales and branches one by one, nor of
    biases that undo a shift. About as close as the two models are to the dense ones."""
    name = MODEL if second == "16 bits" else f"{second}.safetensors"

    def merge(graph, other):
        other = graph.add("PixArtLoader", model_name=f"other_{other}")
        graph.model = graph.add("ModelMergeSimple", model1=graph.model, model2=other, ratio=0.5)

    error = sum(relative(latents(host, quantised, "quantised"), latents(host, dense, "dense"))
                for quantised, dense in ((model, MODEL), (f"other_{name}", f"other_{MODEL}")))
    merged = latents(host, model, "merged", lambda g: merge(g, name))
    assert relative(merged, latents(host, MODEL, "both", lambda g: merge(g, MODEL))) < error


def test_the_loader_shows_what_runs_the_layers(host, model):
    host.free()  # or the host would have the node's output still
    graph = StarterGraph(model=model)
    save(graph, graph.ksampler(steps=1), "shown")
    shown = "".join(text for _, text in host.run(graph).progress_text)
    name = {"svdquant": "svdquant_w4a4", "int8": "int8_tensorwise", "int4": "awq_w4a16"}
    runs = ("unpacked for each product (its kernels take 16 bits, the model computes in float32)"
            if model.startswith("int4") else "eager (plain PyTorch on the CPU)")
    assert f"layers in {name[model.split('.')[0]]}: {runs}" in shown


def test_a_model_in_place_of_a_lora_is_refused(host, files):
    """Its patches are stored tensors, of which the host would want the originals of this model."""
    graph = StarterGraph(model="svdquant.safetensors")
    other = graph.add("PixArtLoader", model_name=f"other_{MODEL}")
    graph.positive = graph.add("ConditioningSetProperties", cond_NEW=graph.positive,
                               hooks=graph.add("ProbeModelAsLora", model=other), strength=1.0,
                               set_cond_area="default")
    save(graph, graph.ksampler(steps=1), "refused")
    refused(host, graph, "quantised file", "pixart convert", kind="execution")


@pytest.mark.parametrize("change", ["bias", "bias and weight"])
def test_a_trained_bias_behind_the_gelu(host, files, change):
    """A LoRA file may bring it whole; what the stored bias takes back is not lost by it."""
    weights, _ = pc.open_transformer(STARTER.transformer)
    tensors = load_file(files / "loras" / LORA)
    for leaf in change.split(" and "):
        name = f"blocks.4.mlp.fc2.{leaf}"
        weight = weights[name].float()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        tensors[f"diffusion_model.{name}"] = weight + weight.std() * noise
    save_file(tensors, files / "loras" / "biased.safetensors")
    host.free()

    def load(graph):
        ours(graph, name="biased.safetensors")

    model = "svdquant.safetensors"
    changed, dense = (latents(host, m, "biased", load) for m in (model, MODEL))
    bare, dense_bare = latents(host, model, "bare"), latents(host, MODEL, "dense_bare")
    assert relative(dense, dense_bare) > 0.02
    assert relative(changed, dense) < 2 * relative(bare, dense_bare)


def test_saving_a_quantised_model_says_what_to_do(host, model):
    graph = StarterGraph(model=model)
    graph.add("ModelSave", model=graph.model, filename_prefix="packed")
    refused(host, graph, "quantised file", "pixart convert", kind="execution")
