"""Small helpers that several host tests share: saving, reading back, comparing."""

from __future__ import annotations

import pytest
from graphs import LCM, StarterGraph
from launch import has_package
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart_core.starter import find_starter

STARTER = find_starter()


def has_kitchen(installation):
    """Whether the host has the library for quantised layers."""
    return has_package(installation.python, "comfy_kitchen")


def require_kitchen(installation):
    if not has_kitchen(installation):
        pytest.skip("no package comfy-kitchen in the environment of this ComfyUI")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def save(graph, value, name):
    return graph.add("ProbeSaveTensors", value=value, name=name)


def saved(host, name, key="value.samples"):
    return host.read_tensors(name)[key]


def lcm_latents(host, name="lcm", model=LCM, loader=None, **settings):
    """Latents of the LCM node on the starter's student."""
    graph = StarterGraph(model=model, **(loader or {}))
    save(graph, graph.lcm(**settings), name)
    host.run(graph)
    return saved(host, name)


def choices(host, node, name):
    """What a combo input offers."""
    definition = host.object_info(node)["input"]["required"][name]
    return definition[1]["options"] if isinstance(definition[0], str) else definition[0]


def starter_file():
    """(weights, metadata) of the starter's student."""
    with safe_open(STARTER.lcm, "pt") as file:
        return load_file(STARTER.lcm), file.metadata()


def parted(tensors):
    """Tensors that share no memory, as safetensors wants them."""
    return {k: v.contiguous().clone() for k, v in tensors.items()}


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
