"""The transformer against the outputs of the official PixArt code, stored in tests/golden."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pixart_core as pc

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(p.stem for p in (*GOLDEN.glob("alpha_*"), *GOLDEN.glob("sigma_*")))


def read_golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["meta"])


def weights_of(name):
    tensors, meta = read_golden(name)
    if "weights" in meta:
        tensors, _ = read_golden(meta["weights"])
    return {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}


def load(name, dtype=torch.float32):
    _, meta = read_golden(name)
    fields = {"num_heads": meta["num_heads"]}
    if "kv_compression" in meta:
        fields["kv_compression"] = meta["kv_compression"]
    return pc.load_transformer(weights_of(name), dtype=dtype, **fields)


def run(model, tensors):
    inputs = [tensors.get(f"in.{k}") for k in ("x", "timestep", "caption", "caption_mask",
                                               "image_size", "aspect_ratio")]
    with torch.no_grad():
        return model(*inputs).float()


def relative(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


def test_every_variant_has_a_case():
    assert len(CASES) == 11


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_official_code(name):
    """Variant, position table, micro-conditioning, packed masks, KV compression, qk-norm."""
    tensors, _ = read_golden(name)
    out = run(load(name), tensors)
    assert relative(out, tensors["out"]) < 1e-5
    assert (out - tensors["out"]).abs().max() < 1e-4 * tensors["out"].std()


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
                         ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_stays_close(name, dtype, bar):
    """Guards the float32 time path and the float64 position table."""
    tensors, _ = read_golden(name)
    assert relative(run(load(name, dtype), tensors), tensors["out"]) <= bar


@pytest.mark.parametrize("name", ["alpha_512", "sigma_1024_kv_conv"])
def test_per_sample_masks_equal_separate_unpadded_runs(name):
    """Guidance as one batch must not let a sample see another's padding."""
    tensors, _ = read_golden(name)
    model = load(name)
    for i in range(len(tensors["in.x"])):
        count = int(tensors["in.caption_mask"][i].sum())
        one = slice(i, i + 1)
        with torch.no_grad():
            out = model(tensors["in.x"][one], tensors["in.timestep"][one],
                        tensors["in.caption"][one, :count])
        assert relative(out, tensors["out"][one]) < 1e-5


def test_prepared_caption_changes_nothing():
    """Keys and values made once per prompt give the pass that makes them each time."""
    tensors, _ = read_golden("sigma_512")
    model = load("sigma_512")
    with torch.no_grad():
        caption = model.prepare_caption(tensors["in.caption"], tensors["in.caption_mask"])
        out = model(tensors["in.x"], tensors["in.timestep"], caption)
    assert relative(out, tensors["out"]) < 1e-5
