"""ComfyUI_ExtraModels workflows on this pack's nodes: every mapping, and nothing else touched."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_core.resolution import ASPECT_RATIO_BINS, nearest_bin
from pixart_core.workflow import WorkflowError, read_workflow, upgrade, write_workflow
from pixart_core.workflow.extramodels import BASES, NOT_MAPPED, OLD_NODES
from pixart_core.workflow.layout import box
from pixart_core.workflow.targets import TARGETS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "extramodels"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
PAGES = [name for name in NAMES if not name.startswith("api_")]


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def levels(document):
    return [document, *document.get("definitions", {}).get("subgraphs", [])]


def link_row(link):
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return tuple(link[name] for name in names) if isinstance(link, dict) else tuple(link)


def check_links(document):
    """Each link stands at both its ends, each end names a link that is there, and types fit."""
    for level in levels(document):
        nodes = {node["id"]: node for node in level["nodes"]}
        assert len(nodes) == len(level["nodes"])
        rows = [link_row(link) for link in level["links"]]
        assert len({row[0] for row in rows}) == len(rows)
        ends = set()
        for number, origin, out, target, slot, kind in rows:
            if origin == -10:
                source = level["inputs"][out]
                assert number in source["linkIds"]
            else:
                source = nodes[origin]["outputs"][out]
                assert number in source["links"]
            if target == -20:
                goal = level["outputs"][slot]
                assert number in goal["linkIds"]
            else:
                goal = nodes[target]["inputs"][slot]
                assert goal["link"] == number
                ends.add((target, slot))
            assert source["type"] == kind, (number, source, kind)
            assert goal["type"] in (kind, "*") or goal.get("widget"), (number, goal, kind)
        numbers = {row[0] for row in rows}
        for node in level["nodes"]:
            for index, slot in enumerate(node["inputs"]):
                assert slot.get("link") is None or (node["id"], index) in ends
            for slot in node["outputs"]:
                assert set(slot.get("links") or ()) <= numbers
        if "last_link_id" in level:
            assert max(numbers, default=0) <= level["last_link_id"]
            assert max(nodes, default=0) <= level["last_node_id"]


def node(document, number):
    if "nodes" not in document:
        return document[str(number)]
    return next(n for level in levels(document) for n in level["nodes"] if n["id"] == number)


def value(document, number, name):
    """A widget of a new node."""
    found = node(document, number)
    if "class_type" in found:
        return found["inputs"][name]
    return found["widgets_values"][TARGETS[found["type"]].widget_index(name)]


def kind(document, number):
    found = node(document, number)
    return found.get("class_type") or found["type"]


def feeds(document, number, name):
    """(node, slot) that an input is wired to."""
    found = node(document, number)
    if "class_type" in found:
        return tuple(found["inputs"][name])
    slot = next(s for s in found["inputs"] if s["name"] == name)
    rows = [link_row(link) for level in levels(document) for link in level["links"]
            if found in level["nodes"]]
    return next((row[1], row[2]) for row in rows if row[0] == slot["link"])


def reason(report, number):
    [row] = [row for row in report.left if row.node == number]
    return row.notes[0]


# every document


@pytest.mark.parametrize("name", PAGES)
def test_the_samples_are_sound(name):
    """check_links can be trusted: it accepts what was there before."""
    check_links(golden(name))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_is_sound_afterwards(name):
    """Protects graphs from wires that hang in the air or join different types."""
    check_links(upgrade(golden(name))[0])


@pytest.mark.parametrize("name", NAMES)
def test_upgrading_twice_changes_nothing_more(name):
    once, first = upgrade(golden(name))
    twice, second = upgrade(once)
    assert twice == once
    assert not second.upgraded and [r.node for r in second.left] == [r.node for r in first.left]


@pytest.mark.parametrize("name", NAMES)
def test_no_old_node_goes_unnamed(name):
    """What is still there of the old pack is in the report with a reason."""
    before = golden(name)
    after, report = upgrade(before)
    assert before == golden(name), "the caller's document was changed"
    nodes = ([(n["id"], n["type"]) for level in levels(after) for n in level["nodes"]]
             if "nodes" in after else [(k, n["class_type"]) for k, n in after.items()])
    still = {number for number, type_name in nodes
             if type_name in OLD_NODES or type_name in NOT_MAPPED}
    assert still == {row.node for row in report.left}
    assert all(row.notes and row.notes[0] for row in report.left)


@pytest.mark.parametrize("name", PAGES)
def test_other_nodes_places_and_groups_stay(name):
    before, (after, report) = golden(name), upgrade(golden(name))
    touched = {(row.place, row.node) for row in report.upgraded}
    for old, new in zip(levels(before), levels(after), strict=True):
        place = old.get("name", "")
        now = {n["id"]: n for n in new["nodes"]}
        assert old["groups"] == new["groups"]
        for n in old["nodes"]:
            if n["id"] not in now:
                assert (place, n["id"]) in touched
                continue
            for key in ("pos", "size", "mode", "flags", "order", "color", "bgcolor"):
                assert now[n["id"]].get(key) == n.get(key)
            if (place, n["id"]) not in touched and n["type"] in ("Note", "SaveImage", "KSampler"):
                assert now[n["id"]]["widgets_values"] == n["widgets_values"]


# models and text encoders


def alone(kind_name, **inputs):
    """What becomes of one API node: (type, inputs, report)."""
    document, report = upgrade({"1": {"class_type": kind_name, "inputs": inputs}})
    return document["1"]["class_type"], document["1"]["inputs"], report


@pytest.mark.parametrize(("model", "variant"), [
    ("PixArtMS_XL_2", "alpha"), ("PixArt_XL_2", "alpha"), ("PixArtMS_Sigma_XL_2", "sigma"),
    ("PixArtMS_Sigma_XL_2_900M", "sigma"), ("PixArtMS_Sigma_XL_2_2K", "sigma")])
def test_the_model_type_becomes_the_variant(model, variant):
    """A diffusers file cannot tell alpha from Sigma: what the user chose must not get lost."""
    new, inputs, report = alone("PixArtCheckpointLoader", ckpt_name="a.safetensors", model=model)
    assert (new, inputs) == ("PixArtLoader", {"model_name": "a.safetensors",
                                              "weight_dtype": "auto", "variant": variant})
    assert [(m.name, m.old, m.new) for m in report.moves] == [
        ("a.safetensors", "checkpoints", "diffusion_models")]


def test_the_automatic_loader_stays_automatic():
    assert alone("PixArtCheckpointLoaderSimple", ckpt_name="a.pth")[:2] == (
        "PixArtLoader", {"model_name": "a.pth", "weight_dtype": "auto", "variant": "auto"})


@pytest.mark.parametrize(("name", "path_type", "device", "dtype", "expected", "moved", "word"), [
    ("t5xxl.safetensors", "file", "cpu", "default", ("t5xxl.safetensors", "cpu"),
     "t5xxl.safetensors", ""),
    ("xxl/model.safetensors", "file", "auto", "FP16", ("xxl/model.safetensors", "default"),
     "xxl/model.safetensors", "xxl/"),
    ("xxl/pytorch_model-00001-of-00002.bin", "folder", "gpu", "bnb4bit", ("xxl/", "default"),
     "xxl/", "GGUF"),
    ("a\\xxl\\m.bin", "folder", "cuda:1", "default", ("a/xxl/", "default"), "a/xxl/", "cuda:1"),
    ("model.safetensors", "folder", "cpu", "default", ("t5/", "cpu"), "the folder t5 itself", ""),
    ("x/m.bin", "folder", "bnb8bit", None, ("x/", "default"), "x/", "bitsandbytes"),
])
def test_t5_files_and_folders(name, path_type, device, dtype, expected, moved, word):
    """The old folder mode took the folder around a file; the last case is from before dtype."""
    extra = {} if dtype is None else {"dtype": dtype}
    new, inputs, report = alone("T5v11Loader", t5v11_name=name, t5v11_ver="xxl",
                                path_type=path_type, device=device, **extra)
    assert (new, inputs["t5_name"], inputs["device"]) == ("PixArtT5Loader", *expected)
    assert report.moves[0].name == moved and report.moves[0].new == "text_encoders"
    assert word in " ".join(report.rows[0].notes)


def test_prompts_keep_their_meaning():
    """T5TextEncode knew weights and took the text as it was; the reference node did neither."""
    document = golden("api_alpha")
    after, _ = upgrade(document)
    assert after["3"]["inputs"] == {
        "clip": ["2", 0], "text": document["3"]["inputs"]["text"], "clean_caption": False,
        "max_tokens": 120, "width": 64, "height": 64, "aspect_ratio": 0.0, "weights": True}
    assert (after["4"]["inputs"]["clean_caption"], after["4"]["inputs"]["weights"]) == (True, False)


def test_the_token_limit_is_that_of_the_model():
    """120 for alpha, 300 for Sigma, and the model's own where only its file tells."""
    assert value(upgrade(golden("api_alpha"))[0], 3, "max_tokens") == 120
    assert value(upgrade(golden("subgraph"))[0], 4, "max_tokens") == 300
    auto = upgrade(golden("sigma_reroute"))[0]
    assert feeds(auto, 5, "model") == (1, 0) and feeds(auto, 6, "model") == (1, 0)


def test_wired_text_stays_wired_and_its_primitive_knows_the_widget():
    after, _ = upgrade(golden("sigma_reroute"))
    assert feeds(after, 5, "text") == (7, 0)
    slot = next(s for s in node(after, 5)["inputs"] if s["name"] == "text")
    assert slot["widget"] == {"name": "text"} and slot["type"] == "STRING"
    assert node(after, 7) == node(golden("sigma_reroute"), 7)


def test_a_primitive_follows_a_widget_that_is_renamed():
    """Both ends of the wire must name one widget, or the page drops the wire."""
    document = {"last_node_id": 2, "last_link_id": 1, "version": 0.4, "groups": [],
                "links": [[1, 2, 0, 1, 0, "COMBO"]], "nodes": [
        {"id": 1, "type": "PixArtCheckpointLoaderSimple", "widgets_values": ["a.pth"],
         "inputs": [{"name": "ckpt_name", "type": "COMBO", "link": 1,
                     "widget": {"name": "ckpt_name"}}], "outputs": []},
        {"id": 2, "type": "PrimitiveNode", "widgets_values": ["a.pth", "fixed"], "inputs": [],
         "outputs": [{"name": "COMBO", "type": "COMBO", "links": [1],
                      "widget": {"name": "ckpt_name"}}]}]}
    after, _ = upgrade(document)
    check_links(after)
    assert node(after, 1)["inputs"][0]["widget"] == {"name": "model_name"}
    assert node(after, 2)["outputs"][0]["widget"] == {"name": "model_name"}


def test_reroutes_carry_clip_now():
    after, _ = upgrade(golden("sigma_reroute"))
    assert node(after, 4)["outputs"][0]["type"] == node(after, 4)["outputs"][0]["name"] == "CLIP"
    assert {link[5] for link in after["links"]} & {"T5", "CLIP"} == {"CLIP"}


def test_titles_of_the_user_stay_and_defaults_go():
    after, _ = upgrade(golden("alpha_2023"))
    assert node(after, 3)["title"] == "the prompt" and "title" not in node(after, 4)
    after, _ = upgrade(golden("api_alpha"))
    assert after["1"]["_meta"] == {"title": "PixArt Model Loader"}
    assert after["3"]["_meta"] == {"title": "prompt"}


def test_a_node_no_longer_claims_to_be_of_the_old_pack():
    """The page would offer to install it."""
    assert node(upgrade(golden("sigma_reroute"))[0], 1)["properties"] == {
        "Node name for S&R": "PixArtLoader"}


def test_t5_out_of_an_sd3_clip():
    after, report = upgrade(golden("sd3_clip"))
    assert kind(after, 3) == "PixArtT5Loader" and node(after, 3)["inputs"] == []
    assert value(after, 3, "t5_name") == "t5xxl_fp8_e4m3fn.safetensors"
    assert kind(after, 5) == "CLIPTextEncode" and feeds(after, 5, "clip") == (3, 0)
    assert "padding was 8" in " ".join(next(r for r in report.rows if r.node == 3).notes)
    # the size needs a node that takes it
    assert kind(after, 4) == "PixArtTextEncode" and feeds(after, 4, "clip") == (3, 0)
    assert value(after, 4, "text") == "a castle" and value(after, 4, "width") == 1024


# sizes, LoRA, VAE, sampler

UNTRAINED = [0.52]


@pytest.mark.parametrize("model", BASES)
def test_every_ratio_gives_the_size_it_gave(model):
    """The old ratio was width over height. The tables are not symmetric: a size that no model was
    trained at is told, with the one that comes out now; every other comes out as it was."""
    base, untrained = int(BASES[model]), []
    for ratio, (width, height) in ASPECT_RATIO_BINS[base].items():
        _, inputs, report = alone("PixArtResolutionSelect", model=model, ratio=f"{ratio:.2f}")
        assert (inputs["width"], inputs["height"]) == (width, height)
        assert inputs["aspect_ratio"] == "from width and height" and inputs["base"] == str(base)
        same = nearest_bin(base, height=height, width=width) == (height, width)
        assert same is not bool(report.rows[0].notes)
        if not same:
            untrained.append(ratio)
    assert untrained == UNTRAINED
    assert alone("PixArtResolutionSelect", model=model, ratio="0.25")[1]["width"] == base // 2


def test_lora():
    new, inputs, report = alone("PixArtLoraLoader", model=["9", 0], lora_name="x.safetensors",
                                strength=0.8)
    assert (new, inputs) == ("PixArtLoRALoader", {"model": ["9", 0], "lora_name": "x.safetensors",
                                                  "strength": 0.8, "alpha": 0.0})
    assert "alpha" in report.rows[0].notes[0] and not report.moves


def test_vae():
    assert alone("ExtraVAELoader", vae_name="v.pt", vae_type="kl-f8", dtype="auto")[:2] == (
        "VAELoader", {"vae_name": "v.pt"})


def test_the_reference_sampler_in_the_page_format():
    after, report = upgrade(golden("alpha_2023"))
    assert node(after, 7)["widgets_values"] == [1234, "randomize", 14, 4.5, "dpmpp_2m", "simple",
                                                1.0]
    assert [s["name"] for s in node(after, 7)["inputs"]] == ["model", "positive", "negative",
                                                             "latent_image"]
    assert "null caption" in next(r for r in report.rows if r.node == 7).notes[0]


def test_resolution_in_the_page_format():
    after, _ = upgrade(golden("alpha_2023"))
    assert node(after, 5)["widgets_values"] == ["1024", "from width and height", 768, 1280, 1]
    assert [o["type"] for o in node(after, 5)["outputs"]] == ["INT", "INT", "LATENT"]
    assert feeds(after, 6, "height") == (5, 1)


# conditioning


def test_sizes_move_into_the_prompt():
    after, _ = upgrade(golden("sigma_reroute"))
    assert (value(after, 5, "width"), value(after, 5, "height")) == (1024, 768)
    assert feeds(after, 10, "positive") == (5, 0)


def test_of_two_sizes_in_a_row_the_last_one_counts():
    cond = {"class_type": "PixArtResolutionCond"}
    after, _ = upgrade({
        "1": {**cond, "inputs": {"cond": ["2", 0], "width": 8, "height": 8}},
        "2": {**cond, "inputs": {"cond": ["3", 0], "width": 16, "height": 16}},
        "3": {"class_type": "T5TextEncode", "inputs": {"text": "a"}},
        "4": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}})
    assert set(after) == {"3", "4"} and after["3"]["inputs"]["width"] == 8
    assert after["4"]["inputs"]["positive"] == ["3", 0]


def test_a_prompt_that_is_used_elsewhere_gets_no_size():
    """The other use would get it too."""
    _, report = upgrade({
        "1": {"class_type": "PixArtResolutionCond",
              "inputs": {"cond": ["3", 0], "width": 8, "height": 8}},
        "3": {"class_type": "T5TextEncode", "inputs": {"text": "a"}},
        "4": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "negative": ["3", 0]}}})
    assert "elsewhere" in reason(report, "1")


def test_sigma_is_not_told_a_size():
    after, report = upgrade(golden("subgraph"))
    assert "no effect" in next(r for r in report.rows if r.node == 6).notes[0]
    [inside] = after["definitions"]["subgraphs"]
    assert [n["id"] for n in inside["nodes"]] == [4, 5]
    assert value(after, 4, "width") == 0


@pytest.mark.parametrize("name", ["controlnet", "api_controlnet"])
def test_a_controlnet_is_a_file_of_its_own(name):
    """Base model and ControlNet part; the image goes in without the VAE Encode before it."""
    document = golden(name)
    after, report = upgrade(document, control_base="base.pth")
    number = (lambda n: str(n)) if name.startswith("api") else (lambda n: n)
    assert value(after, 1, "model_name") == "base.pth" and value(after, 1, "variant") == "alpha"
    loader, _ = feeds(after, 8, "control_net")
    assert kind(after, loader) == "PixArtControlNetLoader"
    control_file = next(m.name for m in report.moves if m.new == "controlnet")
    assert value(after, loader, "control_net_name") == control_file
    assert feeds(after, 8, "image") == (number(5), 0) and feeds(after, 8, "vae") == (number(6), 0)
    assert feeds(after, 8, "positive") == (number(3), 0)
    assert feeds(after, 8, "negative") == (number(4), 0)
    sampler = 13 if name == "controlnet" else 11
    assert feeds(after, sampler, "positive") == (number(8), 0)
    assert feeds(after, sampler, "negative") == (number(8), 1)
    assert number(9) not in ([n["id"] for n in after["nodes"]] if "nodes" in after else after)


def test_a_wired_size_follows_through_a_controlnet():
    after, _ = upgrade(golden("controlnet"))
    assert feeds(after, 3, "width") == (11, 0) and value(after, 3, "height") == 832


def test_the_released_base_is_named_where_the_caller_names_none():
    after, report = upgrade(golden("controlnet"))
    assert value(after, 1, "model_name") == "PixArt-XL-2-1024-MS.pth"
    assert "--control-base" in next(r for r in report.rows if r.node == 1).notes[0]


def test_a_new_node_lies_free():
    before, (after, _) = golden("controlnet"), upgrade(golden("controlnet"))
    old = {n["id"] for n in before["nodes"]}
    [new] = [n for n in after["nodes"] if n["id"] not in old]
    left, top, right, bottom = box(new)
    for other in after["nodes"]:
        if other is not new:
            x, y, x2, y2 = box(other)
            assert right <= x or x2 <= left or bottom <= y or y2 <= top, other["type"]


# what is left


@pytest.mark.parametrize(("number", "words"), [
    (1, "another model"), (2, "HYDiTTextEncoderLoader"), (3, "HYDiTTextEncode"), (5, "node 3"),
    (6, "MoVQ3"), (7, "PixArtHyper_3"), (8, "4 widget values"), (10, "LoadLatent"),
    (11, "node 10"), (13, "ConditioningCombine"), (15, "another model"), (16, "--cpu-vae"),
    (17, "CheckpointLoaderSimple")])
def test_what_is_left_says_why(number, words):
    before, (after, report) = golden("left"), upgrade(golden("left"))
    assert words in reason(report, number)
    assert node(after, number) == node(before, number)


@pytest.mark.parametrize("inputs", [
    {"ckpt_name": "a.pth", "model": ["9", 0]}, {"ckpt_name": "a.pth"},
    {"ckpt_name": "a.pth", "model": "PixArtMS_XL_2", "precision": "fp16"}])
def test_unknown_versions_of_a_node_are_left(inputs):
    new, kept, report = alone("PixArtCheckpointLoader", **inputs)
    assert new == "PixArtCheckpointLoader" and kept == inputs and report.left


def test_a_size_that_is_bypassed_is_left():
    document = golden("sigma_reroute")
    node(document, 8)["mode"] = 4
    after, report = upgrade(document)
    assert "bypassed" in reason(report, 8) and value(after, 5, "width") == 0


def test_group_nodes_are_named():
    document = {**golden("alpha_2023"),
                "extra": {"groupNodes": {"mine": {"nodes": [{"type": "T5TextEncode"}]}}}}
    _, report = upgrade(document)
    assert [(row.place, row.old) for row in report.left] == [("mine", "T5TextEncode")]


# subgraphs


def test_the_ends_of_a_subgraph_carry_clip():
    after, _ = upgrade(golden("subgraph"))
    [inside] = after["definitions"]["subgraphs"]
    assert inside["inputs"][0]["type"] == "CLIP"
    assert node(after, 2)["inputs"][0]["type"] == "CLIP"


def inside_a_subgraph(document):
    """The document as a subgraph's inside, with links as objects, and an empty page around it."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    level = {"id": "5a6f0f6e-7d0e-4a38-8f6a-2f1c3b9d1e78", "name": "all", "version": 1,
             "inputs": [], "outputs": [], "groups": document["groups"], "nodes": document["nodes"],
             "state": {"lastNodeId": document["last_node_id"],
                       "lastLinkId": document["last_link_id"]},
             "links": [dict(zip(names, row, strict=True)) for row in document["links"]]}
    return {"nodes": [{"id": 99, "type": level["id"], "inputs": [], "outputs": []}], "links": [],
            "groups": [], "last_node_id": 99, "last_link_id": 40, "version": 0.4,
            "definitions": {"subgraphs": [level]}}


@pytest.mark.parametrize("name", ["controlnet", "sigma_reroute", "sd3_clip", "left"])
def test_a_subgraph_is_upgraded_like_a_page(name):
    """Links are objects there, and further ids must be free in the whole document."""
    plain, flat = upgrade(golden(name))
    after, report = upgrade(inside_a_subgraph(golden(name)))
    check_links(after)
    [level] = after["definitions"]["subgraphs"]
    assert [(r.node, r.old, r.new) for r in report.rows] == [
        (r.node, r.old, r.new) for r in flat.rows]
    assert [n["type"] for n in level["nodes"]] == [n["type"] for n in plain["nodes"]]
    assert len({n["id"] for n in level["nodes"]} | {99}) == len(level["nodes"]) + 1
    highest = max([99, *(n["id"] for n in level["nodes"])])
    assert after["last_node_id"] >= highest and level["state"]["lastNodeId"] >= max(
        n["id"] for n in level["nodes"])
    assert all(isinstance(link, dict) for link in level["links"])


def test_rings_end():
    """Files that make no sense must not hang the command."""
    ring = {"last_node_id": 4, "last_link_id": 3, "version": 0.4, "groups": [], "links": [
        [1, 1, 0, 2, 0, "T5"], [2, 2, 0, 1, 0, "T5"], [3, 2, 0, 3, 0, "T5"]], "nodes": [
        {"id": 1, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 2}],
         "outputs": [{"name": "", "type": "T5", "links": [1]}]},
        {"id": 2, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 1}],
         "outputs": [{"name": "", "type": "T5", "links": [2, 3]}]},
        {"id": 3, "type": "T5TextEncode", "inputs": [{"name": "T5", "type": "T5", "link": 3}],
         "outputs": [], "widgets_values": ["a"]}]}
    assert upgrade(ring)[1].upgraded
    cond = {"class_type": "PixArtResolutionCond"}
    _, report = upgrade({
        "1": {**cond, "inputs": {"cond": ["2", 0], "width": 8, "height": 8}},
        "2": {**cond, "inputs": {"cond": ["1", 0], "width": 8, "height": 8}}})
    assert len(report.left) == 2


def test_widgets_shown_outside_are_renamed():
    after, _ = upgrade(golden("subgraph"))
    assert node(after, 2)["properties"]["proxyWidgets"] == [["4", "text"], ["5", "model_name"]]


# ids


def test_no_id_is_in_both_packs():
    """Two packs with one id: ComfyUI would keep the one that it reads last."""
    ours = {found for path in (ROOT / "nodes").glob("*.py")
            for found in re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))}
    assert len(ours) >= 19 and not ours & (set(OLD_NODES) | set(NOT_MAPPED))
    assert {name for name, target in TARGETS.items() if not target.stock} <= ours


# everything else in a document

values = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
                      lambda inner: st.lists(inner, max_size=2), max_leaves=4)
others = st.fixed_dictionaries({
    "type": st.text(max_size=6).map("Other".__add__), "pos": st.lists(st.floats(-99, 99),
                                                                      min_size=2, max_size=2),
    "mode": st.sampled_from([0, 2, 4]), "widgets_values": st.lists(values, max_size=3),
    "properties": st.dictionaries(st.text(max_size=4), values, max_size=2),
    "anything": values})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(nodes=st.lists(others, max_size=4), extra=st.dictionaries(st.text(max_size=5), values),
       name=st.sampled_from(PAGES), data=st.data())
def test_foreign_nodes_come_through_untouched(nodes, extra, name, data):
    """Whatever else is in a document, wired among itself and to outputs of old nodes."""
    document = golden(name)
    first = document["last_node_id"] + 1
    sources = [n for n in document["nodes"] if n["outputs"]]
    for index, one in enumerate(nodes):
        origin = data.draw(st.sampled_from(sources))
        slot = data.draw(st.integers(0, len(origin["outputs"]) - 1))
        out = origin["outputs"][slot]
        if out["type"] == "T5":
            continue
        document["last_link_id"] += 1
        number = document["last_link_id"]
        one = {**one, "id": first + index, "outputs": [],
               "inputs": [{"name": "in", "type": "*", "link": number}]}
        document["nodes"].append(one)
        out["links"] = [*(out["links"] or []), number]
        document["links"].append([number, origin["id"], slot, one["id"], 0, out["type"]])
        document["last_node_id"] = one["id"]
    document["mine"] = extra
    before = copy.deepcopy(document)
    after, _ = upgrade(document)
    check_links(after)
    assert after["mine"] == extra
    now = {n["id"]: n for n in after["nodes"]}
    for one in before["nodes"]:
        if one["type"].startswith("Other"):
            assert now[one["id"]] == one


# files


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `pixart workflow upgrade` in an empty folder."""
    testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    runner = testing.CliRunner()
    return lambda *words: runner.invoke(app, ["workflow", "upgrade", *map(str, words)])


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(golden("alpha_2023")), encoding="utf-8")
    return path


def fails(result, *words, code=1):
    assert result.exit_code == code, result.output
    missing = [word for word in words if word not in result.stderr]
    assert not missing and "Traceback" not in result.output, result.stderr


def test_the_command_writes_beside_and_lists(run, old):
    before = old.read_bytes()
    result = run(old)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("old.pixart.json").read_text()) == upgrade(golden("alpha_2023"))[0]
    assert old.read_bytes() == before
    for word in ("PixArtT5TextEncode", "KSampler", "diffusion_models", "7 upgraded, 0 left"):
        assert word in result.stdout
    fails(run(old), "old.pixart.json is there already", "--output")


def test_output_in_place_and_dry_run(run, old, tmp_path):
    before = old.read_bytes()
    assert run(old, "--dry-run").exit_code == 0 and sorted(tmp_path.iterdir()) == [old]
    fails(run(old, "-o", old), "--in-place")
    fails(run(old, "-o", "x.png"), ".json")
    fails(run(old, "-o", "no/x.json"), "does not exist")
    fails(run(old, "-o", "x.json", "--in-place"), code=2)
    assert old.read_bytes() == before
    assert run(old, "-o", "x.json").exit_code == 0 and old.read_bytes() == before
    old.chmod(0o640)
    assert run(old, "--in-place").exit_code == 0
    assert old.read_bytes() == Path("x.json").read_bytes() and old.stat().st_mode & 0o777 == 0o640


def test_nothing_to_upgrade_writes_nothing(run, tmp_path):
    template = ROOT / "workflows" / "PixArt-alpha text to image.json"
    result = run(template, "-o", "x.json")
    assert result.exit_code == 0 and "nothing to upgrade" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "words"), [
    (b"{", "not JSON"), (b"\xff\xd8\xff", "neither JSON nor a PNG"), (b"[1]", "a list"),
    (b"{}", "empty"), (b'{"a": 1}', "no ComfyUI workflow"), (b'"x"', "a str"),
    (b'{"nodes": [{}], "links": []}', "no id"), (b'{"nodes": [], "version": 7}', "version 7"),
    (b'{"nodes": [], "links": [[1]]}', "a link is [1]"), (b"[" * 100_000, "not JSON"),
    (b'{"nodes": [], "links": 3}', "a list was expected"),
    (b'{"1": {"class_type": 3, "inputs": {}}}', "node 1"),
    (b"\x89PNG\r\n\x1a\nbroken", "not a sound PNG")])
def test_other_files_are_refused(run, tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    fails(run(path), "x.json", words)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there(run):
    fails(run("none.json"), "does not exist")


@pytest.fixture
def picture(tmp_path):
    """A picture as ComfyUI saves it, with both graphs."""
    chunks, path = PngInfo(), tmp_path / "picture.png"
    prompt = json.dumps(golden("api_alpha"))[:-1] + ', "20": {"class_type": "X", "inputs": {}, ' \
        '"is_changed": [NaN]}}'
    chunks.add_text("prompt", prompt)
    chunks.add_text("workflow", json.dumps(golden("alpha_2023")))
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_a_picture_gives_the_workflow_or_the_prompt(run, picture):
    before = picture.read_bytes()
    assert run(picture, "-o", "page.json").exit_code == 0
    assert run(picture, "--api", "-o", "api.json").exit_code == 0
    assert json.loads(Path("page.json").read_text()) == upgrade(golden("alpha_2023"))[0]
    api = json.loads(Path("api.json").read_text(), parse_constant=pytest.fail)
    assert api["7"]["class_type"] == "KSampler" and api["20"]["is_changed"] == [None]
    fails(run(picture, "--in-place"), "picture", "--output")
    assert picture.read_bytes() == before


def test_a_picture_without_a_workflow(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    fails(run("p.png"), "no workflow and no prompt")


def test_what_is_posted_to_the_server_is_upgraded_inside():
    """{"prompt": ..., "extra_data": {"extra_pnginfo": {"workflow": ...}}}: both agree."""
    after, report = upgrade({"prompt": golden("api_alpha"), "client_id": "x", "extra_data": {
        "extra_pnginfo": {"workflow": golden("alpha_2023")}}})
    assert after["prompt"] == upgrade(golden("api_alpha"))[0]
    assert after["extra_data"]["extra_pnginfo"]["workflow"] == upgrade(golden("alpha_2023"))[0]
    assert after["client_id"] == "x" and report.upgraded


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "w.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_workflow(path, {"a": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_in_every_language_survives_a_file(tmp_path):
    document = {"1": {"class_type": "X", "inputs": {"text": "一只猫 🎨 \ud83d"}}}
    write_workflow(tmp_path / "w.json", document)
    assert read_workflow(tmp_path / "w.json") == document


def test_errors_are_value_errors():
    """Callers of the engine catch ValueError."""
    with pytest.raises(ValueError, match="JSON object"):
        upgrade([])
    assert issubclass(WorkflowError, ValueError)
