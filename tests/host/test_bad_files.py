"""Wrong files: one clear error on the loader that names file, cause and cure; the server lives on.

Files are refused before the workflow starts wherever a look at their header shows what they are.
"""

import json
import os
import struct

import pytest
import torch
from checks import encoded, refused, sampled, starter_file, write, write_bytes
from graphs import StarterGraph
from safetensors.torch import load_file

from pixart_core.starter import find_starter

STARTER = find_starter()
pytestmark = pytest.mark.usefixtures("lives_on")


# names as the published files of each kind have them; what the message says
OTHER_MODELS = {
    "controlnet": (["base_model.x_embedder.proj.weight", "base_model.t_block.1.weight",
                    "controlnet.0.before_proj.weight",
                    "controlnet.0.copied_block.attn.qkv.weight"],
                   ["PixArt ControlNet", "load it with PixArt ControlNet Loader"]),
    "lora": (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
              "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"],
             ["a LoRA", "LoRA loader"]),
    "t5": (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
           ["a T5 text encoder", "load it as a text encoder"]),
    "vae": (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"],
            ["a VAE", "load it as a VAE"]),
    "sdxl": (["model.diffusion_model.input_blocks.0.0.weight",
              "model.diffusion_model.label_emb.0.0.weight"],
             ["Stable Diffusion XL", "host's own loaders"]),
    "ltx": (["patchify_proj.weight", "adaln_single.linear.weight",
             "caption_projection.linear_1.weight", "transformer_blocks.0.attn1.to_q.weight"],
            ["LTX-Video", "host's own loaders"]),
    "strange": (["something.else.weight"], ["not known to PixArt", "something.else.weight"]),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_another_model_in_the_model_loader(host, kind):
    names, words = OTHER_MODELS[kind]
    name = write(host, "diffusion_models", f"really_{kind}.safetensors",
                 dict.fromkeys(names, torch.zeros(1)))
    graph, loader = sampled(name)
    refused(host, graph, name, *words, node=loader)


def _cut(content):
    return content[: len(content) // 2]


def _lying_header(_content):
    header = json.dumps({"t_block.1.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20],
                                              "data_offsets": [0, 1 << 62]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 16


DAMAGED = {
    "truncated": (_cut, ["cut short", "download it again"]),
    "empty": (lambda _: b"", ["is empty"]),
    "huge_header": (lambda _: struct.pack("<Q", 1 << 62) + b"{}", ["header claims"]),
    "lying_header": (_lying_header, ["the tensors take", "16 are there"]),
    "web_page": (lambda _: b"<!DOCTYPE html><html>404</html>", ["web page", "get it again"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(("folder", "source"), [("diffusion_models", "transformer"),
                                                ("text_encoders", "t5_file")])
def test_damaged_file(host, damage, folder, source):
    change, words = DAMAGED[damage]
    content = change(getattr(STARTER, source).read_bytes())
    name = write_bytes(host, folder, f"{damage}.safetensors", content)
    graph, loader = sampled(name) if folder == "diffusion_models" else encoded(name)
    refused(host, graph, name, *words, node=loader)


class MakesAFolder:
    """Code in a pickle: reading it without weights_only makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("folder", ["diffusion_models", "text_encoders"])
def test_code_in_a_pickle_does_not_run(host, folder, as_zip, tmp_path):
    marker = tmp_path / "code_ran"
    name = f"code_{as_zip}.pth"
    weights, _ = starter_file()
    torch.save({"state_dict": weights, "epoch": MakesAFolder(marker)},
               host.models_dir / folder / name, _use_new_zipfile_serialization=as_zip)
    graph, loader = sampled(name) if folder == "diffusion_models" else encoded(name)
    refused(host, graph, name, "weights_only", "save_file", node=loader)
    assert not marker.exists()


def test_weights_that_are_not_numbers(host):
    """Found while loading, before a step is sampled."""
    weights, metadata = starter_file()
    weights["blocks.3.mlp.fc1.weight"][5, 7] = float("nan")
    name = write(host, "diffusion_models", "nan.safetensors", weights, metadata)
    graph, loader = sampled(name)
    error = refused(host, graph, name, "blocks.3.mlp.fc1.weight", "NaN", "damaged",
                    kind="execution", node=loader)
    assert "CheckpointError" in error.type


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.pop("blocks.2.attn.proj.weight"), ["lacks", "blocks.2.attn.proj.weight"]),
    (lambda w: w.update({"blocks.2.attn.extra.weight": torch.zeros(2)}),
     ["blocks.2.attn.extra.weight"]),
    (lambda w: w.update({"blocks.2.mlp.fc2.weight": torch.zeros(3, 4)}),
     ["blocks.2.mlp.fc2.weight", "(3, 4)", "(192, 768)"]),
], ids=["missing", "left_over", "misshapen"])
def test_weights_that_do_not_fit(host, request, change, words):
    weights, metadata = starter_file()
    change(weights)
    name = write(host, "diffusion_models", f"{request.node.callspec.id}.safetensors", weights,
                 metadata)
    graph, loader = sampled(name)
    refused(host, graph, name, *words, node=loader)


def test_a_missing_shard(host):
    weights, metadata = starter_file()
    first = dict(list(weights.items())[:50])
    files = [f"diffusion_pytorch_model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    write(host, "diffusion_models", f"sharded/{files[0]}", first, metadata)
    index = {"weight_map": {k: files[0] if k in first else files[1] for k in weights}}
    folder = host.models_dir / "diffusion_models" / "sharded"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    graph, loader = sampled("sharded/")
    refused(host, graph, files[1], node=loader)


def test_an_unusual_width_needs_its_head_count(host):
    weights, _ = starter_file()
    name = write(host, "diffusion_models", "no_heads.safetensors", weights)
    graph, loader = sampled(name)
    refused(host, graph, name, "192", "num_heads", "pixart_config", node=loader)


@pytest.mark.parametrize(("name", "words"), [
    ("not_there.safetensors", ["not_there.safetensors is not in the diffusion_models folders",
                               "refresh"]),
    ("../../../etc/", ["is not in the diffusion_models folders"]),
    ("/etc/", ["is not in the diffusion_models folders"]),
    ("", ["is not in the diffusion_models folders"]),
])
def test_a_name_that_is_not_in_the_list(host, name, words):
    """Also one that would lead out of the model folders."""
    graph, loader = sampled(name)
    refused(host, graph, *words, node=loader)


def test_a_file_that_changes_is_looked_at_again(host):
    """A download that is repeated needs no restart."""
    name = write_bytes(host, "diffusion_models", "again.safetensors", b"")
    graph, loader = sampled(name)
    refused(host, graph, name, "is empty", node=loader)
    write_bytes(host, "diffusion_models", name, STARTER.transformer.read_bytes())
    host.run(graph)


# text encoders


def tiny_t5(width=64, rows=None, tokenizer=True):
    """Random weights of a T5 encoder of one block with the starter's tokenizer."""
    starter = load_file(STARTER.t5_file)
    rows = rows or starter["shared.weight"].shape[0]
    block = "encoder.block.0.layer."
    shapes = {
        "shared.weight": (rows, width), "encoder.final_layer_norm.weight": (width,),
        f"{block}0.layer_norm.weight": (width,), f"{block}1.layer_norm.weight": (width,),
        f"{block}0.SelfAttention.relative_attention_bias.weight": (32, 2),
        **{f"{block}0.SelfAttention.{n}.weight": (width, width) for n in "qkvo"},
        **{f"{block}1.DenseReluDense.wi_{i}.weight": (2 * width, width) for i in (0, 1)},
        f"{block}1.DenseReluDense.wo.weight": (width, 2 * width),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(s, generator=generator).half() for k, s in shapes.items()}
    return weights | ({"spiece_model": starter["spiece_model"]} if tokenizer else {})


def test_a_text_encoder_of_another_width(host):
    """Both widths are named, on the sampler, where model and text meet."""
    graph, _ = encoded(write(host, "text_encoders", "narrow.safetensors", tiny_t5(64)))
    sampler = next(i for i, n in graph.prompt.items() if n["class_type"] == "PixArtLCMSampler")
    error = refused(host, graph, "64 wide", "128", "PixArt T5 Loader", kind="execution")
    assert error.node == sampler


def test_a_text_encoder_without_a_tokenizer(host):
    name = write(host, "text_encoders", "mute.safetensors", tiny_t5(128, tokenizer=False))
    graph, loader = encoded(name)
    refused(host, graph, name, "no tokenizer", "spiece.model", node=loader)


OTHER_ENCODERS = {
    "umt5": (lambda: tiny_t5(4, rows=256384), ["umT5", "256384", "T5 v1.1 XXL"]),
    "clip_l": (lambda: {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 4),
                        "text_model.embeddings.token_embedding.weight": torch.zeros(8, 4)},
               ["CLIP text encoder", "T5 v1.1"]),
    "transformer": (lambda: starter_file()[0],
                    ["PixArt transformer", "load it with PixArt Model Loader"]),
    "half_a_t5": (lambda: {k: v for k, v in tiny_t5().items() if not k.endswith("wo.weight")},
                  ["lacks", "wo.weight"]),
}


@pytest.mark.parametrize("kind", OTHER_ENCODERS)
def test_another_model_in_the_t5_loader(host, kind):
    make, words = OTHER_ENCODERS[kind]
    name = write(host, "text_encoders", f"really_{kind}.safetensors", make())
    graph, loader = encoded(name)
    refused(host, graph, name, *words, node=loader)


def test_a_stock_clip_in_the_text_node(host):
    """The host builds a CLIP-L from one tensor of it; only its tokens matter here."""
    name = write(host, "text_encoders", "clip_l.safetensors",
                 {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3072, 768)})
    graph = StarterGraph()
    graph.clip = graph.add("CLIPLoader", clip_name=name, type="stable_diffusion")
    graph.positive = graph.encode("a red circle")
    graph.picture(graph.lcm(steps=1))
    refused(host, graph, "the CLIP is no T5", "PixArt T5 Loader", kind="execution",
            node=graph.positive)
