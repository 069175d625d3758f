"""The harness itself: a real server runs, fails, is interrupted, and is understood.

Every other host test leans on these behaviours; stock and probe nodes only.
"""

import time

import pytest
import torch
from client import Graph, RunFailedError
from PIL import Image


def sleep_graph(steps=2, seconds=0.0, text=""):
    graph = Graph()
    graph.add("ProbeSleep", steps=steps, seconds=seconds, text=text)
    return graph


def test_the_server_is_the_installation_that_was_found(host, installation):
    assert host.system_stats()["system"]["comfyui_version"] == installation.version


def test_everything_the_server_writes_stays_in_its_base_directory(host):
    stats = host.system_stats()["system"]
    argv = stats.get("argv", [])
    assert str(host.base) in argv
    assert (host.base / "comfyui.db").exists()


def test_object_info_of_an_unknown_node_is_a_key_error(host):
    with pytest.raises(KeyError):
        host.object_info("NoSuchNode")


def test_a_second_run_of_a_graph_is_cached_and_keeps_its_outputs(host):
    graph = sleep_graph(text="cache")
    first, second = host.run(graph), host.run(graph)
    assert first.ran("ProbeSleep") and not first.was_cached("ProbeSleep")
    assert second.was_cached("ProbeSleep") and not second.ran("ProbeSleep")
    assert first.json("ProbeSleep") == second.json("ProbeSleep") == {"slept": 0.0}


def test_progress_previews_and_progress_text_arrive_with_their_node(host):
    result = host.run(sleep_graph(steps=3, text="said once"))
    assert result.progress == [("1", 1, 3), ("1", 2, 3), ("1", 3, 3)]
    assert [p.node for p in result.previews] == ["1", "1", "1"]
    assert result.previews[0].image.size == (8, 8)
    assert result.progress_text == [("1", "said once")]


def test_an_error_in_a_node_comes_back_with_node_type_and_message(host):
    graph = Graph()
    graph.add("ProbeFail", message="the reason")
    error = host.run(graph, ok=False).error
    assert (error.kind, error.node, error.node_type) == ("execution", "1", "ProbeFail")
    assert (error.type, error.message) == ("ValueError", "the reason")
    with pytest.raises(RunFailedError, match="the reason"):
        host.run(graph)


def test_a_value_out_of_range_is_a_validation_error(host):
    error = host.run(sleep_graph(steps=-1), ok=False).error
    assert (error.kind, error.node_type) == ("validation", "ProbeSleep")
    assert "steps" in error.message


def test_a_success_is_not_taken_for_the_failure_that_was_asked_for(host):
    with pytest.raises(AssertionError, match="expected to fail"):
        host.run(sleep_graph(), ok=False)


def test_a_running_prompt_can_be_interrupted(host):
    job = host.submit(sleep_graph(steps=10000, seconds=0.01, text="interrupt"))
    job.wait_for(lambda result: result.progress)
    assert len(host.queue()["queue_running"]) == 1
    host.interrupt()
    result = job.wait(30)
    assert (result.status, result.error.kind) == ("interrupted", "interrupted")
    assert host.run(sleep_graph()).status == "success"


def test_a_prompt_that_takes_too_long_is_stopped(host):
    with pytest.raises(TimeoutError):
        host.run(sleep_graph(steps=10000, seconds=0.01, text="slow"), timeout=0.5)
    assert host.run(sleep_graph()).status == "success"


def test_a_picture_goes_in_by_upload_and_out_by_view(host):
    picture = Image.new("RGB", (16, 8), (10, 20, 30))
    graph = Graph()
    loaded = graph.add("LoadImage", image=host.upload(picture, "harness.png"))
    graph.add("SaveImage", images=loaded, filename_prefix="harness")
    [saved] = host.run(graph).images("SaveImage")
    back = host.picture(saved)
    assert back.size == (16, 8)
    assert back.convert("RGB").getpixel((3, 3)) == (10, 20, 30)


def test_tensors_go_in_and_out_of_a_graph_unchanged(host):
    samples, embeds = torch.randn(2, 4, 8, 8), torch.randn(1, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    latent_file = host.write_tensors("latent", {"samples": samples})
    text_file = host.write_tensors("text", {"embeds": embeds, "mask": mask})
    graph = Graph()
    latent = graph.add("ProbeLoadLatent", file=latent_file)
    text = graph.add("ProbeLoadConditioning", file=text_file, options='{"width": 512}')
    graph.add("ProbeSaveTensors", value=latent, name="latent_out")
    seen = graph.add("ProbeSaveTensors", value=text, name="text_out")
    result = host.run(graph)
    assert torch.equal(host.read_tensors("latent_out")["value.samples"], samples)
    text_out = host.read_tensors("text_out")
    assert torch.equal(text_out["value.0.0"], embeds)
    assert torch.equal(text_out["value.0.1.attention_mask"], mask)
    assert result.json(seen)["values"] == {"value.0.1.width": 512}


def test_an_added_model_is_listed_loaded_counted_and_freed(host, repository):
    source = repository / "starter" / "vae" / "vae_starter.safetensors"
    name = host.add_model("vae", source, "harness.safetensors")
    assert name in host.object_info("VAELoader")["input"]["required"]["vae_name"][0]
    graph = Graph()
    vae = graph.add("VAELoader", vae_name=name)
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    picture = graph.add("VAEDecode", vae=vae, samples=latent)
    graph.add("ProbeModelInfo", model=vae)
    graph.add("ProbeMemory", after=picture)
    result = host.run(graph)
    memory, info = result.json("ProbeMemory"), result.json("ProbeModelInfo")
    assert memory["count"] == 1
    assert memory["models"][0]["loaded_bytes"] == info["bytes"] > 0
    assert info["parameters"] > 0 and info["load_device"] == "cpu"
    host.free()
    after = Graph()
    after.add("ProbeMemory")
    wait_until(lambda: host.run(after).json("ProbeMemory")["count"] == 0)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
