"""Out of memory in the host: one clear message, models freed, and the server lives on."""

import time

import pytest
import torch
from checks import save, saved
from graphs import MODEL, StarterGraph
from prompt import Graph

HOST_TIPS = "you ran out of memory on your GPU"
DEVICE = ["device", "accelerator"]  # what the host frees models after
MACHINE = ["machine", "python"]


def memory(host):
    graph = Graph()
    node = graph.add("ProbeMemory")
    return host.run(graph).json(node)


def failing(failure, **size):
    """A graph whose second model call runs out of memory, and the sampler in it."""
    graph = StarterGraph(**size)
    graph.model = graph.add("ProbeCalls", model=graph.model, label="full", fail_at=2,
                            failure=failure)
    node = graph.ksampler(steps=3)
    graph.picture(node)
    return graph, node


def latents(host, name):
    graph = StarterGraph()
    graph.model = graph.add("ProbeCalls", model=graph.model, label=name)  # so nothing is cached
    save(graph, graph.ksampler(steps=3), name)
    host.run(graph)
    return saved(host, name)


@pytest.mark.parametrize("failure", [*DEVICE, *MACHINE])
def test_sampling_out_of_memory(host, failure):
    """The words are ours and stand once; the host's own tips follow where it knows the error.

    After that models are freed by the host or can be, and the next prompt draws as before.
    """
    before = latents(host, "before_full")
    graph, node = failing(failure, width=256, height=192, batch=2)
    error = host.run(graph, ok=False).error
    assert error.kind == "execution" and error.node == node.id
    assert error.message.startswith(
        "Not enough memory for the PixArt-alpha transformer (2 pictures of 256 x 192 px, "
        "2 conditions at once, float32, 16 MB of weights, attention_")
    assert error.message.count("Not enough memory") == error.message.count("What helps") == 1
    assert ("\n1. batch_size 1 on the latent node instead of 2, and more runs\n"
            "2. a smaller picture than 256 x 192 px; the model was trained at 128 x 128\n"
            ) in error.message
    assert "pixart quantize" in error.message
    assert "--lowvram" not in error.message  # which a CPU has no use of
    held = memory(host)["count"]
    if failure in DEVICE:
        assert error.type == "torch.OutOfMemoryError"
        assert error.message.count(HOST_TIPS) == 1
        assert held == 0
    else:
        assert error.type == "MemoryError"
        assert HOST_TIPS not in error.message and held > 0
        host.free()
        deadline = time.monotonic() + 20  # it does so on its own thread
        while memory(host)["count"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert memory(host)["count"] == 0
    assert torch.equal(latents(host, "after_full"), before)


def test_sizes_that_torch_tells_are_told(host):
    for failure, words in (("device", "It tried to allocate 20.00 GiB."),
                           ("machine", "It tried to allocate 10000000000000000 bytes.")):
        assert words in host.run(failing(failure)[0], ok=False).error.message


def test_only_what_would_help_is_named(host):
    """One picture within the trained size, of weights in 8 bits, without a ControlNet."""
    graph = StarterGraph(weight_dtype="float8_e4m3fn")
    graph.model = graph.add("ProbeCalls", model=graph.model, label="full", fail_at=1,
                            failure="python")
    graph.picture(graph.ksampler(steps=1))
    message = host.run(graph, ok=False).error.message
    assert "(1 picture of 64 x 64 px" in message and "\n1. a smaller picture" in message
    absent = ("batch_size", "trained", "pixart quantize", "Control")
    assert not any(words in message for words in absent)


def test_other_models_that_take_room_are_named(host):
    """T5 with the prompt, and the VAE that made the first latent."""
    graph = StarterGraph()
    start = graph.add("VAEEncode", vae=graph.vae, pixels=graph.add(
        "EmptyImage", width=64, height=64, batch_size=1, color=0x30A03C))
    graph.model = graph.add("ProbeCalls", model=graph.model, label="full", fail_at=1,
                            failure="python")
    graph.picture(graph.ksampler(steps=1, latent_image=start))
    message = host.run(graph, ok=False).error.message
    assert "\n2. fewer other models, which hold TAESD 10 MB" in message
    assert "PixArt Save Embeddings" in message


@pytest.mark.parametrize("failure", ["device", "machine"])
def test_encoding_out_of_memory(host, lives_on, failure):
    graph = StarterGraph()
    graph.clip = graph.add("ProbeFullClip", clip=graph.clip, failure=failure)
    node = graph.encode("a red circle")
    save(graph, node, "never")
    error = host.run(graph, ok=False).error
    assert error.node == node.id
    assert error.message.startswith("Not enough memory for the text encoder (")
    assert "PixArt Load Embeddings" in error.message
    assert "device: cpu" not in error.message  # it is there already


@pytest.mark.parametrize("failure", ["device", "python"])
def test_loading_out_of_memory(host, lives_on, failure):
    graph = Graph()
    node = graph.add("ProbeFullLoader", model_name=MODEL, failure=failure)
    graph.add("ProbeModelInfo", model=node)
    error = host.run(graph, ok=False).error
    assert error.node == node.id
    assert error.message.startswith(f"Not enough memory for loading {MODEL} (")
    assert "\n1. a smaller file of the same model: pixart quantize" in error.message
