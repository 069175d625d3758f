"""Wrong files, wires and values: one clear error on the node, and the server lives on.

Each error names what was given, what is wrong with it and what to do. Files are refused before
the workflow starts wherever a look at their header shows what they are.
"""

import itertools
import json
import os
import struct

import pytest
import torch
from graphs import MODEL, T5, Graph, StarterGraph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart_core.starter import find_starter

STARTER = find_starter()
_SEEDS = itertools.count(1000)


@pytest.fixture(autouse=True)
def lives_on(host):
    """After every bad prompt the next good one works; its seed is new, so nothing is cached."""
    yield
    assert host.alive()
    graph = StarterGraph()
    graph.picture(graph.lcm(steps=1, seed=next(_SEEDS)))
    host.run(graph)


def refused(host, graph, *words, kind="validation", node=None):
    """The one error of a graph that must fail, once it has every word in its message."""
    result = host.run(graph, ok=False)
    error = result.error
    assert error.kind == kind, str(error)
    if node is not None:
        assert error.node == node.id, str(error)
    if kind == "validation":
        assert [i for i, entry in result.node_errors.items() if entry["errors"]] == [error.node]
        # the host repeats what a node says for every input that it looked at
        details = {e["details"].partition(" - ")[2] or e["details"]
                   for e in result.node_errors[error.node]["errors"]}
        assert len(details) == 1, details
    missing = [word for word in words if word not in error.message]
    assert not missing, f"{missing} not in: {error.message}"
    return error


def write(host, folder, name, tensors, metadata=None):
    """A new weight file in the host's models folder; its name there."""
    path = host.models_dir / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=metadata)
    return name


def write_bytes(host, folder, name, content):
    path = host.models_dir / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


def sampled(model):
    """A graph that uses `model`, and its loader."""
    graph = StarterGraph(model=model)
    graph.picture(graph.lcm(steps=1))
    return graph, graph.model


def encoded(t5):
    """A graph that uses the text encoder `t5`, and its loader."""
    graph = StarterGraph()
    graph.clip = graph.add("PixArtT5Loader", t5_name=t5)
    graph.positive = graph.encode("a red circle")
    graph.picture(graph.lcm(steps=1))
    return graph, graph.clip


def starter_weights():
    """(weights, metadata) of the starter's transformer."""
    with safe_open(STARTER.transformer, "pt") as file:
        return load_file(STARTER.transformer), file.metadata()


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
    weights, _ = starter_weights()
    torch.save({"state_dict": weights, "epoch": MakesAFolder(marker)},
               host.models_dir / folder / name, _use_new_zipfile_serialization=as_zip)
    graph, loader = sampled(name) if folder == "diffusion_models" else encoded(name)
    refused(host, graph, name, "weights_only", "save_file", node=loader)
    assert not marker.exists()


def test_weights_that_are_not_numbers(host):
    """Found while loading, before a step is sampled."""
    weights, metadata = starter_weights()
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
    weights, metadata = starter_weights()
    change(weights)
    name = write(host, "diffusion_models", f"{request.node.callspec.id}.safetensors", weights,
                 metadata)
    graph, loader = sampled(name)
    refused(host, graph, name, *words, node=loader)


def test_a_missing_shard(host):
    weights, metadata = starter_weights()
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
    weights, _ = starter_weights()
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
    "transformer": (lambda: starter_weights()[0],
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


# prompts: whatever is typed, a picture comes


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("text", ["", "   \n\t ", "</s>", "<pad>", "🎨🦄🔥" * 3, "((((:1.5", "{a|b",
                                  "\u0000\ufffd\u202e"],
                         ids=["empty", "spaces", "end_token", "pad_token", "emoji", "weights",
                              "dynamic", "odd_characters"])
def test_odd_prompts_work(host, text, clean):
    graph = StarterGraph()
    positive = graph.add("PixArtTextEncode", clip=graph.clip, text=text, clean_caption=clean,
                         max_tokens=24)
    graph.tensors(positive, "odd_prompt")
    graph.picture(graph.lcm(steps=1, positive=positive))
    assert "24" in host.run(graph).text(positive)
    assert host.read_tensors("odd_prompt")["value.0.0"].isfinite().all()


def test_ten_thousand_words(host):
    """Cut at the limit; the node says how many tokens there were and what was left out."""
    graph = StarterGraph()
    positive = graph.encode(" ".join(["circle"] * 20 + ["lantern"] * 10_000))
    graph.tensors(positive, "long_prompt")
    graph.picture(graph.lcm(steps=1, positive=positive))
    report = host.run(graph).text(positive)
    assert "the limit is 24; cut:" in report and "lantern" in report
    assert int(report.split()[0]) > 10_000
    assert host.read_tensors("long_prompt")["value.0.0"].shape[1] == 24


# sizes and settings


@pytest.mark.parametrize("width", [0, 7, 99999])
def test_sizes_that_no_picture_has(host, width):
    graph = Graph()
    node = graph.add("PixArtResolution", base="1024", aspect_ratio="from width and height",
                     width=width, height=1024, batch_size=1)
    graph.add("ProbeSaveTensors", value=node[2], name="size")
    refused(host, graph, "width", "8" if width < 8 else "16384", node=node)


@pytest.mark.parametrize("width", [0, 99999])
def test_sizes_that_come_by_wire(host, width):
    """Nothing checks a wire before it carries a value: the node does."""
    graph = Graph()
    number = graph.add("PrimitiveInt", value=width)
    node = graph.add("PixArtResolution", base="1024", aspect_ratio="from width and height",
                     width=number, height=1024, batch_size=1)
    graph.add("ProbeSaveTensors", value=node[2], name="size")
    refused(host, graph, f"width is {width} px", "1 to 16384", kind="execution", node=node)


@pytest.mark.parametrize(("width", "height"), [(24, 136), (72, 40)])
def test_odd_multiples_of_eight_work(host, width, height):
    """The latent is not a whole number of patches; the picture still has the size asked for."""
    graph = StarterGraph(width=width, height=height)
    save = graph.picture(graph.lcm(steps=1))
    picture = host.picture(host.run(graph).images(save)[0])
    assert picture.size == (width, height)


WRONG_SCHEDULES = [
    ({"steps": 0}, ["LCM steps is 0", "1 to 50"]),
    ({"steps": 51}, ["LCM steps is 51", "1 to 50"]),
    ({"strength": 0.0}, ["strength is 0.0", "above 0 and at most 1"]),
    ({"strength": 1.5}, ["strength is 1.5", "above 0 and at most 1"]),
    ({"strength": -1.0}, ["strength is -1.0", "above 0 and at most 1"]),
    ({"steps": 8, "strength": 0.05}, ["strength 0.05 leaves 2 of the 50", "smallest strength for "
                                      "8 is 0.16"]),
]


def schedule_graph(node_name, **values):
    """A graph that ends in one of the two LCM nodes, and that node."""
    graph = StarterGraph()
    if node_name == "PixArtLCMSampler":
        node = graph.lcm(**values)
        graph.tensors(node, "schedule")
    else:
        node = graph.add(node_name, **{"steps": 4, "strength": 1.0, "grid": "diffusers", **values})
        graph.tensors(node[1], "schedule")
    return graph, node


@pytest.mark.parametrize("node_name", ["PixArtLCMSampler", "PixArtLCMSchedule"])
@pytest.mark.parametrize(("values", "words"), WRONG_SCHEDULES)
def test_a_schedule_that_does_not_exist(host, node_name, values, words):
    graph, node = schedule_graph(node_name, **values)
    refused(host, graph, *words, node=node)


@pytest.mark.parametrize("node_name", ["PixArtLCMSampler", "PixArtLCMSchedule"])
@pytest.mark.parametrize(("values", "words"), WRONG_SCHEDULES)
def test_a_schedule_that_comes_by_wire(host, node_name, values, words):
    """The same message, when the value is there."""
    graph, node = schedule_graph(node_name)
    for name, value in values.items():
        kind = "PrimitiveInt" if name == "steps" else "PrimitiveFloat"
        graph.prompt[node.id]["inputs"][name] = graph.add(kind, value=value)[0]
    refused(host, graph, *words, kind="execution", node=node)


@pytest.mark.parametrize(("node_name", "key", "option"), [
    ("PixArtLoader", "weight_dtype", "bfloat16"), ("PixArtLoader", "variant", "sigma"),
    ("PixArtT5Loader", "device", "cpu"), ("PixArtResolution", "base", "2880"),
    ("PixArtResolution", "aspect_ratio", "16:9 wide"), ("PixArtLCMSchedule", "grid", "official"),
    ("PixArtLCMSampler", "grid", "official"),
])
def test_a_choice_that_does_not_exist(host, node_name, key, option):
    """Refused at once where the host checks the list, else by the node, with the choices."""
    graph = StarterGraph()
    size = graph.add("PixArtResolution", base="256", aspect_ratio="1:1 square", width=8, height=8,
                     batch_size=1)
    if node_name == "PixArtLCMSchedule":
        schedule = graph.add(node_name, steps=1, strength=1.0, grid="diffusers")
        graph.add("ProbeSaveTensors", value=schedule[1], name="choice")
    else:
        graph.picture(graph.lcm(latent=size[2]))
    node = next(i for i, n in graph.prompt.items() if n["class_type"] == node_name)
    graph.prompt[node]["inputs"][key] = "nonsense"
    error = host.run(graph, ok=False).error
    assert error.node == node, str(error)
    assert "'nonsense'" in error.message and key in error.message and option in error.message


def test_half_a_size(host):
    graph = StarterGraph()
    graph.positive = graph.encode("a red circle", width=512)
    graph.picture(graph.lcm(steps=1))
    refused(host, graph, "width is 512 and height is 0", "give both", kind="execution",
            node=graph.positive)


# a stock ControlNet


def t2i_adapter(wide=8):
    """A T2I-Adapter of Stable Diffusion, eight channels wide."""
    generator = torch.Generator().manual_seed(0)
    channels = [wide, 2 * wide, 4 * wide, 4 * wide]
    weights = {"conv_in": (wide, 64, 3, 3)}
    for i, (before, after) in enumerate(zip([wide, *channels[:3]], channels, strict=True)):
        for j in range(2):
            name = f"body.{2 * i + j}"
            if j == 0 and before != after:
                weights[f"{name}.in_conv"] = (after, before, 1, 1)
            weights[f"{name}.block1"] = (after, after, 3, 3)
            weights[f"{name}.block2"] = (after, after, 1, 1)
    tensors = {f"{k}.weight": torch.randn(s, generator=generator) for k, s in weights.items()}
    return tensors | {f"{k}.bias": torch.zeros(s[0]) for k, s in weights.items()}


def test_a_controlnet_of_another_kind(host):
    """It is not dropped in silence: the picture would ignore what was wired."""
    name = write(host, "controlnet", "t2i.safetensors", t2i_adapter())
    graph = StarterGraph()
    control = graph.add("ControlNetLoader", control_net_name=name)
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    applied = graph.add("ControlNetApplyAdvanced", positive=graph.positive,
                        negative=graph.negative, control_net=control, image=image, strength=1.0,
                        start_percent=0.0, end_percent=1.0)
    node = graph.ksampler(steps=1, positive=applied[0], negative=applied[1])
    graph.picture(node)
    refused(host, graph, "ControlNet", "another kind of model", "take it out", kind="execution",
            node=node)


def test_the_starter_itself_is_good():
    """These tests change copies of it: it must be there, under the names they use."""
    assert (STARTER.transformer.name, STARTER.t5_file.name) == (MODEL, T5)
