"""Each node of ComfyUI_ExtraModels becomes the right one, with the values that it had."""

import pytest
from workflow_documents import alone, check_links, feeds, golden, kind, node, reason, value

from pixart_core.resolution import ASPECT_RATIO_BINS, nearest_bin
from pixart_core.workflow import upgrade
from pixart_core.workflow.extramodels import BASES
from pixart_core.workflow.layout import box

# models and text encoders


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
