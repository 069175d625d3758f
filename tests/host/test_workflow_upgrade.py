"""Upgraded ExtraModels workflows in the real host: they run, and draw what the same graph draws
that was built by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import MODEL, T5, VAE, Graph
from PIL import Image, ImageDraw
from workflow import inputs_of, load, to_api

from pixart_core.workflow import upgrade
from pixart_core.workflow.extramodels import NOT_MAPPED, OLD_NODES
from pixart_core.workflow.targets import TARGETS

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "extramodels"


@pytest.fixture(scope="module")
def object_info(host):
    return host.object_info()


@pytest.mark.parametrize("name", TARGETS)
def test_the_table_is_what_the_host_offers(name, object_info):
    """Widgets, sockets and outputs in the page's order, with types and defaults: a widget out of
    place would give its value to its neighbour."""
    target, info = TARGETS[name], object_info[name]
    widgets, sockets = {}, {}
    for input_name, kind, options in inputs_of(info):
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            widgets[input_name] = ("COMBO" if isinstance(kind, list) else kind, options)
        else:
            sockets[input_name] = kind
    assert list(widgets) == list(target.widgets)
    assert {n: kind for n, (kind, _) in widgets.items()} == {
        n: kind for n, (kind, _) in target.widgets.items()}
    assert sockets == target.sockets and list(sockets) == list(target.sockets)
    assert info["output"] == list(target.outputs.values())
    assert info["output_name"] == list(target.outputs)
    assert info["display_name"] == target.display_name
    if not target.stock:
        for n, (_, options) in widgets.items():
            if "default" in options:
                assert options["default"] == target.widgets[n][1], n
    [seed] = [n for n, (_, o) in widgets.items() if o.get("control_after_generate")] or [None]
    assert seed == target.seed


def pictures(host, prompt):
    [saved] = host.run(prompt).images("SaveImage")
    return torch.from_numpy(np.array(host.picture(saved).convert("RGB"))).float() / 255


class ByHand(Graph):
    """What someone who knows both packs would have built."""

    def __init__(self, text, **loader):
        super().__init__()
        self.model = self.add("PixArtLoader", model_name=MODEL, **loader)
        self.clip = self.add("PixArtT5Loader", t5_name=T5)
        self.vae = self.add("VAELoader", vae_name=VAE)
        self.text = text

    def encode(self, text, **settings):
        return self.add("PixArtTextEncode", clip=self.clip, text=text, **settings)

    def draw(self, positive, negative, latent, seed, steps, sampler="dpmpp_2m",
             scheduler="simple"):
        samples = self.add("KSampler", model=self.model, seed=seed, steps=steps, cfg=4.5,
                           sampler_name=sampler, scheduler=scheduler, positive=positive,
                           negative=negative, latent_image=latent, denoise=1.0)
        image = self.add("VAEDecode", samples=samples, vae=self.vae)
        self.add("SaveImage", images=image, filename_prefix="by hand")
        return self


def by_hand_alpha():
    graph = ByHand("", variant="alpha")
    positive = graph.encode("a large (red:1.2) circle on a blue background", clean_caption=False,
                            max_tokens=120, width=64, height=64)
    negative = graph.encode("", clean_caption=True, max_tokens=120, weights=False)
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    return graph.draw(positive, negative, latent, 5, 6)


def by_hand_auto():
    graph = ByHand("")
    positive = graph.encode("a small green square on a yellow background", clean_caption=False,
                            max_tokens=300, model=graph.model)
    negative = graph.encode("", clean_caption=False, max_tokens=300, model=graph.model)
    latent = graph.add("EmptyLatentImage", width=384, height=640, batch_size=1)
    return graph.draw(positive, negative, latent, 1, 2, "euler", "normal")


def by_hand_controlnet():
    graph = ByHand("", variant="alpha")
    positive = graph.encode("a large red circle on a blue background", clean_caption=False,
                            max_tokens=120)
    negative = graph.encode("", clean_caption=False, max_tokens=120)
    net = graph.add("PixArtControlNetLoader", control_net_name="edges_starter.safetensors")
    image = graph.add("LoadImage", image="edges.png")
    both = graph.add("PixArtControlNetApply", positive=positive, negative=negative,
                     control_net=net, image=image, vae=graph.vae, strength=1.0,
                     start_percent=0.0, end_percent=1.0)
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    return graph.draw(both[0], both[1], latent, 1, 4)


@pytest.mark.parametrize(("name", "by_hand"), [
    ("api_alpha", by_hand_alpha), ("api_auto", by_hand_auto),
    ("api_controlnet", by_hand_controlnet)])
def test_an_upgraded_prompt_draws_the_picture_of_one_built_by_hand(host, name, by_hand):
    edges = Image.new("RGB", (64, 64))
    ImageDraw.Draw(edges).ellipse((12, 12, 48, 48), outline=(255, 255, 255), width=2)
    host.upload(edges, "edges.png")
    prompt, report = upgrade(load(GOLDEN / f"{name}.json"), control_base=MODEL)
    assert not report.left
    made, expected = pictures(host, prompt), pictures(host, by_hand())
    assert made.std() > 0.05
    assert torch.equal(made, expected)


@pytest.mark.parametrize("name", ["alpha_2023", "controlnet", "sd3_clip"])
def test_an_upgraded_page_is_what_the_page_can_queue(name, object_info):
    """Every widget value and wire of the page's format has its place in the host's definition."""
    document, _ = upgrade(load(GOLDEN / f"{name}.json"))
    prompt = to_api(without_primitives(document), object_info)
    for node in prompt.values():
        assert node["class_type"] not in OLD_NODES and node["class_type"] not in NOT_MAPPED
        if node["class_type"] not in TARGETS:
            continue
        kinds = {n: (kind, options) for n, kind, options in
                 inputs_of(object_info[node["class_type"]])}
        for input_name, value in node["inputs"].items():
            kind, options = kinds[input_name]
            if isinstance(value, list):
                continue
            choices = kind if isinstance(kind, list) else options.get("options")
            if choices and not input_name.endswith("_name"):
                assert value in choices, (node["class_type"], input_name)


def test_both_formats_of_one_graph_become_one_prompt(host, object_info):
    """The page's graph, upgraded and queued, is the API graph upgraded; and it runs."""
    page = load(GOLDEN / "alpha_2023.json")
    names = {"PixArt-XL-2-1024-MS.pth": MODEL, "vae-ft-mse-840000-ema-pruned.safetensors": VAE,
             "t5-v1.1-xxl/pytorch_model-00001-of-00002.bin": T5}
    for node in page["nodes"]:
        node["widgets_values"] = [names.get(v, v) for v in node["widgets_values"]]
        if node["type"] == "T5v11Loader":
            node["widgets_values"][2:] = ["file", "cpu", "default"]
        if node["type"] == "PixArtResolutionSelect":
            node["widgets_values"] = ["PixArt_XL_2", "0.60"]
        if node["type"] == "PixArtDPMSampler":
            node["widgets_values"][2] = 2
    old = json.loads((GOLDEN / "api_alpha.json").read_text())
    link = {1: "1", 2: "2", 3: "3", 4: "4", 5: "5", 6: "6", 7: "7", 8: "8", 9: "9"}
    api = {
        "1": {"class_type": "PixArtCheckpointLoader",
              "inputs": {"ckpt_name": MODEL, "model": "PixArtMS_XL_2"}},
        "2": old["2"],
        "3": {"class_type": "PixArtT5TextEncode",
              "inputs": {"text": "A Small Cactus with a happy face", "T5": [link[2], 0]}},
        "4": {"class_type": "PixArtT5TextEncode", "inputs": {"text": "", "T5": [link[2], 0]}},
        "5": {"class_type": "PixArtResolutionSelect",
              "inputs": {"model": "PixArt_XL_2", "ratio": "0.60"}},
        "6": {"class_type": "EmptyLatentImage",
              "inputs": {"width": ["5", 0], "height": ["5", 1], "batch_size": 1}},
        "7": {"class_type": "PixArtDPMSampler", "inputs": {
            "model": ["1", 0], "positive": ["3", 0], "negative": ["4", 0],
            "latent_image": ["6", 0], "seed": 1234, "steps": 2, "cfg": 4.5,
            "noise_schedule": "linear", "noise_schedule_vp": "discrete"}},
        "8": {"class_type": "ExtraVAELoader",
              "inputs": {"vae_name": VAE, "vae_type": "kl-f8", "dtype": "fp16"}},
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["8", 0]}},
        "10": {"class_type": "SaveImage",
               "inputs": {"images": ["9", 0], "filename_prefix": "PixArt"}}}
    queued = to_api(upgrade(page)[0], object_info)
    expected = upgrade(api)[0]
    assert {k: (n["class_type"], n["inputs"]) for k, n in queued.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in expected.items()}
    assert pictures(host, queued).shape == (640, 384, 3)


def without_primitives(document):
    """The page puts the value of a primitive at the other end of its wire."""
    primitives = {n["id"]: n for n in document["nodes"] if n["type"] == "PrimitiveNode"}
    cut = {link[0] for link in document["links"] if link[1] in primitives}
    for node in document["nodes"]:
        for slot in node["inputs"]:
            if slot.get("link") in cut:
                slot["link"] = None
    return {**document, "nodes": [n for n in document["nodes"] if n["id"] not in primitives],
            "links": [link for link in document["links"] if link[0] not in cut]}
