"""CLIP from a T5 in a GGUF file: as the engine encodes with it, and with its weights packed."""

import pytest
import torch
from checks import STARTER, choices, encoded, refused, relative, save, saved, write_bytes
from graphs import TOKENS, TRAINED, Graph, StarterGraph

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
    alone, mask = T5TextEncoder.from_path(file, dtype=torch.float32)("a red circle", TOKENS)
    assert relative(states[0, : int(mask.sum())].float(), alone[mask]) < 2e-3


def test_a_picture(host, file):
    graph = StarterGraph(prompt=PROMPT, **TRAINED)
    graph.clip = graph.add("PixArtT5Loader", t5_name=NAME)
    graph.positive, graph.negative = graph.encode(PROMPT), graph.encode("")
    save(graph, graph.ksampler(steps=3, cfg=STARTER.guidance), "packed_t5")
    host.run(graph)
    plain = StarterGraph(prompt=PROMPT, **TRAINED)
    save(plain, plain.ksampler(steps=3, cfg=STARTER.guidance), "plain_t5")
    host.run(plain)
    assert relative(saved(host, "packed_t5"), saved(host, "plain_t5")) < 5e-3


def test_cut_files_are_refused(host, file):
    write_bytes(host, "text_encoders", "cut_t5.gguf", file.read_bytes()[:-3000])
    graph, loader = encoded("cut_t5.gguf")
    refused(host, graph, "cut_t5.gguf", "cut short", node=loader)


def test_nothing_is_allocated_before_the_packed_weights(host, file):
    """Else a T5 XXL takes 9.5 GB on the way to its 5 GB, on a card at once.

    4 bytes are the host's own logit scale, which T5 does not use.
    """
    graph = Graph()
    graph.add("ProbeConstructedClip", t5_name=NAME)
    found = host.run(graph).json("ProbeConstructedClip")
    assert found["constructed"] == [{"bytes": 4, "loaded": 0}]
    assert found["devices"] == ["cpu"] and found["bytes"] > 100_000


def test_no_dead_model_stays_loaded(host, file):
    """The host would warn of a memory leak with each model that it loads."""
    log = host.base / "server.log"
    start = log.stat().st_size
    for seed in (500, 501):
        graph = StarterGraph()
        graph.clip = graph.add("PixArtT5Loader", t5_name=NAME)
        graph.positive = graph.encode(f"a red circle {seed}")
        graph.add("ProbeMemory", after=graph.ksampler(steps=1, seed=seed))
        memory = host.run(graph).json("ProbeMemory")
        assert memory["dead"] == []
        assert "TextModel" in {model["model"] for model in memory["models"]}
    with log.open("rb") as written:
        written.seek(start)
        assert b"memory leak" not in written.read()
