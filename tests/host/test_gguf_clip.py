"""CLIP from a T5 in a GGUF file: as the engine encodes with it, and with its weights packed."""

import pytest
import torch
from checks import STARTER, choices, encoded, refused, relative, save, saved, write_bytes
from graphs import StarterGraph

from pixart_core.text import T5TextEncoder
from pixart_core.text.t5_file import read_t5
from pixart_core.text.t5_gguf import write_t5_gguf

pytestmark = pytest.mark.gguf
NAME, PROMPT = "packed/t5_starter_Q8_0.gguf", "a large red circle on a blue background"


@pytest.fixture(scope="module")
def file(host):
    """The starter's T5 in Q8_0 with llama.cpp's names, as `pixart convert` writes it."""
    pytest.importorskip("gguf")
    path = host.models_dir / "text_encoders" / NAME
    path.parent.mkdir(exist_ok=True)
    write_t5_gguf(path, read_t5(STARTER.t5_file), "Q8_0")
    return path


def test_listed(host, file):
    assert NAME in choices(host, "PixArtT5Loader", "t5_name")
    assert NAME not in choices(host, "CLIPLoader", "clip_name")


def test_states_equal_the_engines(host, file):
    graph, _ = encoded(NAME)
    save(graph, graph.positive, "gguf_states")
    host.run(graph)
    states = next(t for key, t in host.read_tensors("gguf_states").items()
                  if t.ndim == 3 and t.is_floating_point())
    alone, mask = T5TextEncoder.from_path(file, dtype=torch.float32)("a red circle", 24)
    assert relative(states[0, : int(mask.sum())].float(), alone[mask]) < 2e-3


def test_a_picture(host, file):
    graph = StarterGraph(prompt=PROMPT)
    graph.clip = graph.add("PixArtT5Loader", t5_name=NAME)
    graph.positive, graph.negative = graph.encode(PROMPT), graph.encode("")
    save(graph, graph.ksampler(steps=3), "packed_t5")
    host.run(graph)
    plain = StarterGraph(prompt=PROMPT)
    save(plain, plain.ksampler(steps=3), "plain_t5")
    host.run(plain)
    assert relative(saved(host, "packed_t5"), saved(host, "plain_t5")) < 2e-2


def test_cut_files_are_refused(host, file):
    write_bytes(host, "text_encoders", "cut_t5.gguf", file.read_bytes()[:-3000])
    graph, loader = encoded("cut_t5.gguf")
    refused(host, graph, "cut_t5.gguf", "cut short", node=loader)
