"""Our nodes as the host lists them, the sizes they pick, and what they leave in memory."""

import time

import pytest
from checks import choices, save, saved
from graphs import LCM, Graph, StarterGraph

import pixart_core as pc
from pixart_core.starter import find_starter

STARTER = find_starter()
NODE_IDS = ["PixArtControlNetApply", "PixArtControlNetLoader", "PixArtDMDSampler",
            "PixArtDMDSchedule", "PixArtHEDEdges", "PixArtHint", "PixArtLCMSampler",
            "PixArtLCMSchedule", "PixArtLoRALoader", "PixArtLoadEmbeddings", "PixArtLoader",
            "PixArtNullCaption", "PixArtPromptBatch", "PixArtResolution", "PixArtSASolver",
            "PixArtSaveEmbeddings", "PixArtSchedule", "PixArtT5Loader", "PixArtTextEncode"]


def pixart_nodes(host):
    return {k: v for k, v in host.object_info().items() if k.startswith("PixArt")}


def test_every_node_is_there_and_described(host):
    """Names that workflows are saved with never change; each node says what it does."""
    nodes = pixart_nodes(host)
    assert sorted(nodes) == NODE_IDS
    for name, node in nodes.items():
        assert node["category"].split("/")[0] == "PixArt", name
        assert len(node["category"].split("/")) == 2, name
        assert node["display_name"].startswith("PixArt "), name
        assert len(node["description"]) > 40, name
        assert node["output_node"] is name.startswith("PixArtSave"), name


def test_every_socket_has_a_tooltip(host):
    for name, node in pixart_nodes(host).items():
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        for key, definition in inputs.items():
            assert len(definition[1].get("tooltip", "")) > 10, f"{name}.{key}"
        assert len(node["output_name"]) == len(node["output_tooltips"]) == len(node["output"])
        assert all(node["output_name"]) and all(node["output_tooltips"]), name


def test_only_core_socket_types(host):
    """Every socket fits a stock node."""
    core = {"MODEL", "CLIP", "CONDITIONING", "LATENT", "SAMPLER", "SIGMAS", "INT", "IMAGE",
            "CONTROL_NET"}
    outputs = {kind for node in pixart_nodes(host).values() for kind in node["output"]}
    assert outputs <= core



@pytest.mark.parametrize("base", [256, 512, 1024, 2048, 2880])
def test_resolution_is_the_engines_bin(host, base):
    """All ratios of a base and two free sizes: width, height and latent agree."""
    free = "from width and height"
    shapes = [(name, *map(int, name.split()[0].split(":")))
              for name in choices(host, "PixArtResolution", "aspect_ratio") if name != free]
    assert len(shapes) == 8
    shapes += [(free, 1920, 1080), (free, 8, 16384)]
    graph = Graph()
    for i, (name, width, height) in enumerate(shapes):
        size = (width, height) if name == free else (64, 640)  # not looked at
        node = graph.add("PixArtResolution", base=str(base), aspect_ratio=name, width=size[0],
                         height=size[1], batch_size=2)
        for output in range(3):
            save(graph, node[output], f"size_{i}_{output}")
    result = host.run(graph)
    values = [result.json(i) for i, n in graph.prompt.items()
              if n["class_type"] == "ProbeSaveTensors"]
    for i, (_, width, height) in enumerate(shapes):
        expected = pc.nearest_bin(base, height=height, width=width)
        width_out, height_out, latent = values[3 * i: 3 * i + 3]
        assert (height_out["values"]["value"], width_out["values"]["value"]) == expected
        assert latent["tensors"]["value.samples"][0] == [2, 4, expected[0] // 8, expected[1] // 8]
        assert not saved(host, f"size_{i}_2").any()


def loaded(host, seed=None):
    """What the host holds loaded: after sampling with a new `seed`, or as it is."""
    graph = Graph()
    after = {}
    if seed is not None:
        graph = StarterGraph(model=LCM)
        after["after"] = graph.lcm(seed=seed)
    graph.add("ProbeMemory", **after)
    return host.run(graph).json("ProbeMemory")


def test_free_releases_everything(host):
    assert loaded(host, seed=200)["count"] > 0
    host.free()
    patience = time.monotonic() + 30
    while loaded(host)["count"] and time.monotonic() < patience:
        time.sleep(0.2)
    assert loaded(host)["count"] == 0
    assert loaded(host, seed=201)["count"] > 0


def test_repeated_runs_do_not_pile_up(host):
    """Five runs, each of which really samples, hold what one holds."""
    loaded(host, seed=100)  # whatever was there before is cached and dropped by now
    once = loaded(host, seed=101)
    again = [loaded(host, seed=seed) for seed in range(102, 107)]
    assert [(run["count"], run["bytes"]) for run in again] == [(once["count"], once["bytes"])] * 5
