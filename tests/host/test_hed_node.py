"""Edges and hints for the ControlNet: the nodes against the engine, on pictures of every kind."""

import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
from checks import STARTER, choices, refused, save, saved, write, write_bytes
from graphs import Graph
from PIL import Image
from safetensors import safe_open

from pixart_core.model.hed import HEDDetector

NARROW = (4, 4, 6, 6, 4)


def draw(widths, seed):
    """Random weights; for the released widths and seed 77 those behind the golden outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, empty in sorted(HEDDetector(widths, device="meta").state_dict().items()):
        noise = torch.randn(empty.shape, generator=generator)
        scale = 1.2 / math.sqrt(math.prod(noise.shape[1:])) if noise.ndim == 4 else 0.1
        weights[name] = noise * scale
    return weights


@pytest.fixture(scope="module")
def narrow(host):
    """A network of few channels and soft edges: its file's name, and the engine's detector."""
    weights = draw(NARROW, seed=1)
    for name in weights:
        if "projection" in name:
            weights[name] /= 50  # logits of a few units, where the sigmoid does not hide anything
    return write(host, "controlnet", "narrow_hed.safetensors", weights), HEDDetector.from_path(
        weights)


def picture(host, name, width, height, mode="RGB"):
    """An uploaded picture of noise; its name, and its pixels (1, C, H, W) in 0..1."""
    channels = {"RGB": 3, "RGBA": 4}[mode]
    generator = np.random.default_rng(width * 1000 + height)
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    host.upload(Image.fromarray(pixels, mode), f"{name}.png")
    return f"{name}.png", torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def edges(host, name, image, hed, **settings):
    """What PixArt HED Edges makes of an uploaded picture: (B, 1, H, W); the run."""
    graph = Graph()
    loaded = graph.add("LoadImage", image=image)
    node = graph.add("PixArtHEDEdges", image=loaded, hed_name=hed, **settings)
    save(graph, node, name)
    result = host.run(graph)
    image = saved(host, name, "value")
    assert image.shape[-1] == 3
    assert torch.equal(image[..., :1].expand_as(image), image)
    return image[..., :1].permute(0, 3, 1, 2), result


def test_the_node_gives_the_official_edges(host, repository):
    """Golden weights and picture, through a file in the host's controlnet folder."""
    with safe_open(repository / "tests" / "golden" / "hed_random.safetensors", "pt") as golden:
        image, expected = golden.get_tensor("in.image"), golden.get_tensor("out.edge")
    name = write(host, "controlnet", "hed/ControlNetHED.safetensors",
                 draw((64, 128, 256, 512, 512), seed=77))
    pixels = image[0].permute(1, 2, 0).byte().numpy()
    host.upload(Image.fromarray(pixels), "golden_hed.png")
    found, _ = edges(host, "hed_golden", "golden_hed.png", name)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_every_picture_of_a_batch_is_the_engines(host, narrow):
    hed, detector = narrow
    graph = Graph()
    (a, first), (b, second) = picture(host, "hed_a", 70, 45), picture(host, "hed_b", 45, 70)
    loaded = graph.add("LoadImage", image=b)
    turned = graph.add("ImageRotate", image=loaded, rotation="90 degrees")
    batch = graph.add("ImageBatch", image1=graph.add("LoadImage", image=a), image2=turned)
    node = graph.add("PixArtHEDEdges", image=batch, hed_name=hed)
    save(graph, node, "hed_batch")
    result = host.run(graph)
    found = saved(host, "hed_batch", "value")[..., 0]
    for image, edge in zip((first, second.rot90(-1, (2, 3))), found, strict=True):
        assert torch.allclose(edge, detector(image)[0, 0], atol=1e-5)
    assert (node.id, 2, 2) in result.progress


def test_tiles_give_the_same_edges(host, narrow):
    hed, detector = narrow
    name, image = picture(host, "hed_large", 333, 290)
    found, result = edges(host, "hed_tiles", name, hed, tile=256)
    assert torch.allclose(found, detector(image), atol=1e-5)
    assert max(total for _, _, total in result.progress) > 4  # it really was in tiles


def test_a_large_picture_is_tiled_by_itself(host, narrow):
    hed, detector = narrow
    name, image = picture(host, "hed_wide", 2064, 40)
    found, result = edges(host, "hed_auto", name, hed)
    assert torch.allclose(found, detector(image), atol=1e-5)
    assert max(total for _, _, total in result.progress) == 3


def test_transparent_is_white(host, narrow):
    hed, detector = narrow
    name, image = picture(host, "hed_alpha", 50, 40, "RGBA")
    graph = Graph()
    loaded = graph.add("LoadImage", image=name)
    joined = graph.add("JoinImageWithAlpha", image=loaded, alpha=loaded[1])
    save(graph, graph.add("PixArtHEDEdges", image=joined, hed_name=hed), "hed_alpha")
    host.run(graph)
    alpha = image[:, 3:]
    expected = detector(image[:, :3] * alpha + (1 - alpha))
    assert torch.allclose(saved(host, "hed_alpha", "value")[..., 0], expected[:, 0], atol=1e-5)


def test_an_interrupt_is_heard_between_tiles(host, narrow):
    hed, _ = narrow
    name, _ = picture(host, "hed_long", 3000, 3000)
    graph = Graph()
    loaded = graph.add("LoadImage", image=name)
    node = graph.add("PixArtHEDEdges", image=loaded, hed_name=hed, tile=256)
    save(graph, node, "hed_long")
    job = host.submit(graph)
    job.wait_for(lambda result: any(value > 0 for _, value, _ in result.progress))
    host.interrupt()
    result = job.wait()
    assert result.status == "interrupted"
    assert result.error.node == node.id
    value, total = result.progress[-1][1:]
    assert value < total


# what is refused


def graph_with(host, hed, **settings):
    name, _ = picture(host, "hed_small", 32, 32)
    graph = Graph()
    loaded = graph.add("LoadImage", image=name)
    node = graph.add("PixArtHEDEdges", image=loaded, hed_name=hed, **settings)
    save(graph, node, "hed_refused")
    return graph, node


def test_the_list_is_the_controlnet_folder(host, narrow):
    write_bytes(host, "controlnet", "any_controlnet.safetensors", b"")
    offered = choices(host, "PixArtHEDEdges", "hed_name")
    assert {narrow[0], "any_controlnet.safetensors"} <= set(offered)


WRONG = {
    "transformer": (lambda: STARTER.transformer.read_bytes(),
                    ["PixArt transformer", "PixArt Model Loader"]),
    "web_page": (lambda: b"<!DOCTYPE html><html>404</html>", ["web page"]),
    "empty": (lambda: b"", ["is empty"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_detector_is_refused_before_the_run(host, case):
    content, words = WRONG[case]
    name = write_bytes(host, "controlnet", f"no_hed_{case}.safetensors", content())
    graph, node = graph_with(host, name)
    refused(host, graph, name, *words, node=node)


def test_a_detector_that_lacks_a_weight_is_refused_before_the_run(host):
    weights = draw(NARROW, seed=1)
    del weights["block4.convs.2.weight"]
    name = write(host, "controlnet", "part_hed.safetensors", weights)
    graph, node = graph_with(host, name)
    refused(host, graph, name, "lacks", "block4.convs.2.weight", node=node)


def test_a_detector_in_the_model_loader_is_told_its_node(host):
    name = write(host, "diffusion_models", "hed_here.safetensors", draw(NARROW, seed=1))
    graph = Graph()
    loader = graph.add("PixArtLoader", model_name=name)
    graph.add("ProbeModelInfo", model=loader)
    refused(host, graph, name, "HED edge detector", "PixArt HED Edges", node=loader)


@pytest.mark.parametrize("tile", [16, 240, 300])
def test_a_tile_that_cannot_be_is_refused(host, narrow, tile):
    graph, node = graph_with(host, narrow[0], tile=tile)
    refused(host, graph, f"tile is {tile}", "multiple of 16", node=node)


# drawings


def lines(host, name, image, invert):
    graph = Graph()
    node = graph.add("PixArtHint", image=graph.add("LoadImage", image=image), invert=invert)
    save(graph, node, name)
    host.run(graph)
    hint = saved(host, name, "value")
    assert torch.equal(hint[..., :1].expand_as(hint), hint)
    assert hint.shape[-1] == 3
    return hint[..., 0]


def drawing(host, name, ink, paper):
    """A diagonal line; its pixels as grey values."""
    pixels = np.full((24, 30, 3), paper, np.uint8)
    for i in range(20):
        pixels[i, i] = ink
    host.upload(Image.fromarray(pixels), f"{name}.png")
    return f"{name}.png"


@pytest.mark.parametrize(("ink", "paper", "invert", "line", "ground"), [
    (0, 255, "auto", 1.0, 0.0), (255, 0, "auto", 1.0, 0.0),
    (0, 255, "no", 0.0, 1.0), (255, 0, "yes", 0.0, 1.0), (0, 255, "yes", 1.0, 0.0),
])
def test_hint_inverts_what_is_asked_or_found(host, ink, paper, invert, line, ground):
    name = drawing(host, f"drawing_{ink}", ink, paper)
    hint = lines(host, "hint", name, invert)
    assert hint.shape == (1, 24, 30)
    assert hint[0, 5, 5].item() == pytest.approx(line, abs=1e-6)
    assert hint[0, 5, 6].item() == pytest.approx(ground, abs=1e-6)


def test_hint_decides_for_each_picture_of_a_batch(host):
    graph = Graph()
    images = [graph.add("LoadImage", image=drawing(host, f"ink_{ink}", ink, 255 - ink))
              for ink in (0, 255)]
    batch = graph.add("ImageBatch", image1=images[0], image2=images[1])
    save(graph, graph.add("PixArtHint", image=batch, invert="auto"), "hint_batch")
    host.run(graph)
    first, second = saved(host, "hint_batch", "value")
    assert torch.allclose(first, second, atol=1e-6)
    assert first[3, 3, 0] > 0.99


def test_colours_become_grey_by_their_brightness(host):
    """Green lines are brighter than blue ones."""
    pixels = np.zeros((8, 9, 3), np.uint8)
    pixels[:3, 0, 0] = pixels[:3, 1, 1] = pixels[:3, 2, 2] = 255
    host.upload(Image.fromarray(pixels), "colours.png")
    hint = lines(host, "colours", "colours.png", "auto")
    assert hint[0, 0, :4].tolist() == pytest.approx([0.299, 0.587, 0.114, 0.0], abs=1e-5)


# what a graph cannot bring about

SCRIPT = """
import json, sys, types
import torch
import comfy.options
comfy.options.enable_args_parsing()
pack, weights = sys.argv.pop(1), sys.argv.pop(1)
for name, folder in (("the_pack", pack), ("the_pack.nodes", pack + "/nodes")):
    sys.modules[name] = types.ModuleType(name)  # the other nodes want a server
    sys.modules[name].__path__ = [folder]
from the_pack.nodes.hed import rgb
from the_pack.nodes.host import hed

images = torch.rand(2, 600, 40, 3, generator=torch.Generator().manual_seed(0))
whole = hed.detect_edges(weights, images)
forward, tiles = hed.HEDDetector.forward, []

def short_of_memory(self, image, tile, progress):
    tiles.append(tile)
    if tile > limit:
        raise torch.cuda.OutOfMemoryError("out of memory")
    return forward(self, image, tile, progress)

hed.HEDDetector.forward = short_of_memory
limit = 256
retried = hed.detect_edges(weights, images)
report = {"tiles": list(tiles), "difference": (retried - whole).abs().max().item()}
limit = 0
try:
    hed.detect_edges(weights, images)
except torch.cuda.OutOfMemoryError as error:
    report["given_up_at"], report["message"] = tiles[-1], str(error)
grey = rgb(images[..., :1])
report["grey"] = list(grey.shape), torch.equal(grey[..., 2], images[..., 0])
try:
    rgb(images[..., :2])
except ValueError as error:
    report["refused"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def in_process(installation, repository, host, narrow):
    """The pack's host code run in the host's own Python, where memory can be made to run out."""
    weights = str(host.models_dir / "controlnet" / narrow[0])
    done = subprocess.run(
        [installation.python, "-c", SCRIPT, str(repository), weights, "--cpu",
         "--base-directory", str(host.base)],
        cwd=installation.path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(installation.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_out_of_memory_goes_on_in_smaller_tiles(in_process):
    """Each picture is worked through once; what was learnt is kept for the next."""
    assert in_process["tiles"] == [608, 512, 256, 256]
    assert in_process["difference"] < 1e-5


def test_out_of_memory_in_the_smallest_tile_is_told(in_process):
    assert in_process["given_up_at"] == 256
    assert in_process["message"].startswith(
        "Not enough memory for HED edges of a 40 x 600 px image in tiles of 256 px")
    assert "1. a smaller image" in in_process["message"]


def test_grey_images_and_odd_channel_counts(in_process):
    assert in_process["grey"] == [[2, 600, 40, 3], True]
    assert "(2, 600, 40, 2)" in in_process["refused"]
