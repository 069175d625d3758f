"""The official outputs through the host's own sampling path: calc_cond_batch and apply_model."""

import json
from pathlib import Path

import pytest
from graphs import Graph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(p.stem for p in (*GOLDEN.glob("alpha_*"), *GOLDEN.glob("sigma_*")))


def meta_of(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"])


def add_model(host, name, tmp_path):
    """The golden weights as a file of ours: native names, config in the header."""
    meta = meta_of(name)
    tensors = load_file(GOLDEN / f"{meta.get('weights', name)}.safetensors")
    weights = {k.removeprefix("weights."): v for k, v in tensors.items()
               if k.startswith("weights.")}
    config = {k: meta[k] for k in ("variant", "num_heads", "kv_compression") if k in meta}
    path = tmp_path / f"golden_{name}.safetensors"
    save_file(weights, path, metadata={"pixart_config": json.dumps(config)})
    return host.add_model("diffusion_models", path)


def apply(host, name, tmp_path, **loader):
    """(eps, official output) of a golden case through PixArtLoader and the sampling path."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    inputs = {k.removeprefix("in."): v for k, v in tensors.items() if k.startswith("in.")}
    options = {}
    if "image_size" in inputs:
        # the host knows one size for a batch; the golden batch has the same in all of it
        (height, width), ratio = inputs.pop("image_size")[0], inputs.pop("aspect_ratio")[0]
        options = {"height": int(height), "width": int(width), "aspect_ratio": ratio.item()}
    graph = Graph()
    model = graph.add("PixArtLoader", model_name=add_model(host, name, tmp_path), **loader)
    graph.add("ProbeApplyModel", model=model, name=name, options=json.dumps(options),
              file=host.write_tensors(f"golden_{name}", inputs))
    host.run(graph)
    return host.read_tensors(name)["eps"], tensors["out"][:, :4]


def relative(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_official_code(host, name, tmp_path):
    """bar: 1e-5. Batches of unequal captions with their masks, micro-conditioning, compression."""
    eps, expected = apply(host, name, tmp_path, weight_dtype="float32")
    assert relative(eps, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "bar"), [("bfloat16", 8e-3), ("float16", 1e-3)])
def test_half_precision_stays_close(host, dtype, bar, tmp_path):
    """The float32 time path survives the host's casting."""
    eps, expected = apply(host, "sigma_512", tmp_path, weight_dtype=dtype)
    assert relative(eps, expected) < bar
