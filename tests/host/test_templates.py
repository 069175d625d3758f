"""The workflow templates: valid for the page, runnable as they are, and with the right picture."""

import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from checks import STARTER, require_kitchen
from PIL import Image
from workflow import NOTES, inputs_of, load, to_api

from pixart_core.training.evaluate import detect
from pixart_core.training.scenes import COLORS, Scene, SceneObject, render

REPOSITORY = Path(__file__).resolve().parents[2]

PACK = "ComfyUI-PixArt-Delta"
FOLDER = REPOSITORY / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
LCM_PAIR = ("PixArt-delta LCM 4 steps", "PixArt-delta LCM custom sampling")
# precision and text_cache of PixArt T5 Loader, transformer, decoder
SMALL_CARDS = {"PixArt 8 GB": ("int8", False, STARTER.lcm.name, "VAEDecode"),
               "PixArt 6 GB": ("int4", False, STARTER.lcm.name, "VAEDecodeTiled"),
               "PixArt 4 GB": ("int4", True, STARTER.lcm_svdquant.name, "VAEDecodeTiled")}
SIDE = STARTER.image_size
INPUT_SCENE = Scene(SIDE, SIDE, "one", "green", (
    SceneObject("yellow", "square", "small", 0.25 * SIDE, 0.5 * SIDE, 0.14 * SIDE),), place="left")


@pytest.fixture(scope="module")
def object_info(host):
    return host.object_info()


@pytest.fixture(scope="module")
def runs(host, installation):
    """Name -> result of a template run through its API file, once each."""
    example = (render([INPUT_SCENE])[0].permute(1, 2, 0) * 255).byte().numpy()
    host.upload(Image.fromarray(example).resize((768, 768)), "example.png")
    made = {}

    def run(name):
        if name in SMALL_CARDS:
            require_kitchen(installation)
        if name not in made:
            made[name] = host.run(load(FOLDER / "api" / f"{name}.json"))
        return made[name]

    return run


@pytest.fixture(scope="module")
def pictures(host, runs):
    """Name -> the picture (3, H, W) in 0..1 that a template saves."""
    return lambda name: saved_picture(host, runs(name))


def saved_picture(host, result):
    [saved] = result.images("SaveImage")
    pixels = torch.from_numpy(np.array(host.picture(saved).convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 255


def nodes_of(name, kind):
    """The inputs of every node of a class in an API file."""
    return [node["inputs"] for node in load(FOLDER / "api" / f"{name}.json").values()
            if node["class_type"] == kind]


def prompted(name):
    """Object colour and background colour in the positive prompt, which comes first."""
    text = nodes_of(name, "PixArtTextEncode")[0]["text"]
    found = re.findall("|".join(COLORS), text)
    assert len(found) == 2, text
    return found


def without_titles(prompt):
    """Titles of stock nodes differ between hosts, and mean nothing when a prompt runs."""
    return {number: {key: node[key] for key in ("class_type", "inputs")}
            for number, node in prompt.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_api_file_is_what_the_page_would_queue(name, object_info):
    """Every node type exists, every widget value and wire has its place. Run
    `python -m benchmarks.thumbnails` after changing a template."""
    queued = to_api(load(FOLDER / f"{name}.json"), object_info)
    assert without_titles(load(FOLDER / "api" / f"{name}.json")) == without_titles(queued)


def test_no_api_file_or_thumbnail_is_without_its_template():
    assert sorted(path.stem for path in (FOLDER / "api").iterdir()) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.jpg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_sound(name, object_info):
    """Links agree with both their ends in place and type, and ids are unique."""
    workflow = load(FOLDER / f"{name}.json")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    assert workflow["version"] == 0.4
    ids = [link[0] for link in workflow["links"]]
    assert len(set(ids)) == len(ids) and max(ids) == workflow["last_link_id"]
    for number, source, out, target, slot, kind in workflow["links"]:
        assert nodes[source]["outputs"][out]["type"] == kind
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot] == {**nodes[target]["inputs"][slot],
                                                 "type": kind, "link": number}
    for node in nodes.values():
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        outputs = [slot["type"] for slot in node["outputs"]]
        assert outputs == info["output"][:len(outputs)]  # newer hosts give SaveImage one
        known = {n: kind for n, kind, _ in inputs_of(info)}
        assert all(known[slot["name"]] == slot["type"] for slot in node["inputs"])


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap_and_lie_in_a_group(name):
    """A collapsed node is its title bar, which is above its place."""
    workflow = load(FOLDER / f"{name}.json")
    boxes = [(n["pos"][0], n["pos"][1] - 30, n["pos"][0] + n["size"][0],
              n["pos"][1] + (0 if n["flags"].get("collapsed") else n["size"][1]), n)
             for n in workflow["nodes"]]
    for i, (left, top, right, bottom, node) in enumerate(boxes):
        for other_left, other_top, other_right, other_bottom, other in boxes[i + 1:]:
            assert (right <= other_left or other_right <= left or bottom <= other_top
                    or other_bottom <= top), (node["type"], other["type"])
        if node["type"] not in NOTES:
            assert any(x <= left and y <= top and right <= x + w and bottom <= y + h
                       for x, y, w, h in (g["bounding"] for g in workflow["groups"])), node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_a_template_runs_as_it_is_and_draws_the_prompt(name, pictures):
    image = pictures(name)
    assert image.shape == (3, SIDE, SIDE)
    color, background = prompted(name)
    seen = detect(image)
    assert seen.background == background
    assert color in [thing.color for thing in seen.objects]


def test_inpainting_keeps_what_the_mask_leaves_out(pictures):
    """The left half, with the yellow square of the input, stays; the box is drawn anew."""
    seen = detect(pictures("PixArt inpainting")).objects
    places = {thing.color: thing.x < SIDE / 2 for thing in seen}
    assert places == {"yellow": True, "red": False}


@pytest.mark.parametrize("name", SMALL_CARDS)
def test_a_template_for_a_small_card_is_its_recipe(name):
    """What docs/small-memory.md says for the card: nothing larger is loaded by mistake."""
    precision, cached, transformer, decoder = SMALL_CARDS[name]
    [t5], [model] = nodes_of(name, "PixArtT5Loader"), nodes_of(name, "PixArtLoader")
    assert (t5["precision"], t5["text_cache"]) == (precision, cached)
    assert (model["model_name"], model["weight_dtype"]) == (transformer, "auto")
    [decode] = nodes_of(name, "VAEDecode") + nodes_of(name, "VAEDecodeTiled")
    assert nodes_of(name, decoder) == [decode]
    assert decode.get("tile_size", 512) == 512
    assert [sampler["steps"] for sampler in nodes_of(name, "PixArtLCMSampler")] == [4]


def test_the_smallest_recipe_runs_quantised_layers(runs):
    """The loader says on its node what runs them."""
    assert "layers in svdquant" in runs("PixArt 4 GB").text("PixArtLoader")


def test_the_smallest_recipe_keeps_its_prompt_on_disk(host, runs):
    runs("PixArt 4 GB")  # or skips
    folder = host.base / "user" / "__pixart_delta" / "text_cache"
    before = set(folder.glob("*.safetensors"))
    prompt = load(FOLDER / "api" / "PixArt 4 GB.json")
    [text] = [node for node in prompt.values() if node["class_type"] == "PixArtTextEncode"]
    text["inputs"]["text"] += ", kept on disk"
    host.run(prompt)
    assert set(folder.glob("*.safetensors")) - before


@pytest.mark.parametrize("name", [name for name, recipe in SMALL_CARDS.items()
                                  if recipe[3] == "VAEDecodeTiled"])
def test_a_picture_of_one_tile_is_as_decoded_whole(name, host, pictures):
    prompt = load(FOLDER / "api" / f"{name}.json")
    [decode] = [node for node in prompt.values() if node["class_type"] == "VAEDecodeTiled"]
    decode["class_type"] = "VAEDecode"
    decode["inputs"] = {key: decode["inputs"][key] for key in ("samples", "vae")}
    tiled = pictures(name)
    assert (saved_picture(host, host.run(prompt)) - tiled).abs().max() <= 1.5 / 255


def test_both_lcm_templates_make_one_picture(pictures):
    """PixArtLCMSchedule with the custom sampling nodes is PixArtLCMSampler, as its note says."""
    one, other = map(pictures, LCM_PAIR)
    assert (one - other).abs().max() <= 1 / 255


@pytest.mark.parametrize("name", NAMES)
def test_the_host_lists_a_template_and_serves_its_files(name, host):
    assert name in host.get("/workflow_templates")[PACK]
    for suffix in (".json", ".jpg"):
        status, body = host.request(f"/api/workflow_templates/{PACK}/{quote(name)}{suffix}")
        assert status == 200 and body == (FOLDER / f"{name}{suffix}").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_thumbnail_is_small_and_square(name):
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("JPEG", (400, 400))
    assert path.stat().st_size < 30_000


def test_help_pages_are_served(host, object_info):
    """Under the address the page asks for, for each node of this pack."""
    ours = [name for name, info in object_info.items()
            if info.get("python_module") == f"custom_nodes.{PACK}"]
    assert len(ours) >= 7
    for node in ours:
        status, body = host.request(f"/extensions/{PACK}/docs/{node}.md")
        assert status == 200 and body.decode().startswith("# PixArt "), node
