"""Conversion between native and diffusers names: complete, reversible, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixart_core.checkpoint.convert import (
    convert_state_dict,
    diffusers_module,
    native_module,
    strip_prefix,
)

STEMS = ("alpha_1024_landscape", "alpha_256", "alpha_512", "sigma_1024", "sigma_256", "sigma_512")


def same(a: dict, b: dict) -> bool:
    """Equal names and equal bits (NaN patterns included)."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        for k in a)


@pytest.mark.parametrize("stem", STEMS)
def test_official_weights_survive_the_round_trip(stem, golden_weights) -> None:
    weights, _ = golden_weights(stem)
    there = convert_state_dict(weights, "diffusers", keep_null_caption=True)
    del weights["pos_embed"]  # the one thing that is computed and not kept
    assert same(convert_state_dict(there, "native"), weights)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(width=st.integers(1, 8).map(lambda n: 12 * n), depth=st.integers(1, 5),
       mlp=st.integers(1, 70), caption=st.integers(1, 40), micro=st.booleans(),
       qk_norm=st.booleans(), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_size_survives_the_round_trip(make_weights, width, depth, mlp, caption, micro, qk_norm,
                                          seed, dtype) -> None:
    weights = make_weights(seed=seed, hidden_size=width, depth=depth, mlp_hidden_size=mlp,
                           caption_channels=caption, num_heads=1, micro_conditioning=micro,
                           qk_norm=qk_norm)
    weights = {k: v.to(dtype) for k, v in weights.items()}
    there = convert_state_dict(weights, "diffusers", keep_null_caption=True)
    assert same(convert_state_dict(there, "native"), weights)
    back = convert_state_dict(convert_state_dict(there, "native"), "diffusers",
                              keep_null_caption=True)
    assert same(back, there)


@pytest.mark.parametrize("micro", [False, True])
def test_names_and_shapes_are_those_of_diffusers(micro, make_weights) -> None:
    """diffusers' own module is the oracle."""
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.PixArtTransformer2DModel(
        num_layers=3, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48,
        caption_channels=24, sample_size=32, use_additional_conditions=micro).state_dict()
    weights = make_weights(depth=3, mlp_hidden_size=192, micro_conditioning=micro)
    converted = convert_state_dict(weights, "diffusers")
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in oracle.items()}


def test_qkv_order(make_weights) -> None:
    """Rows of the fused matrix are q, then k, then v; of the caption's, k then v."""
    weights = make_weights()
    there = convert_state_dict(weights, "diffusers")
    qkv = weights["blocks.1.attn.qkv.weight"]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        part = there[f"transformer_blocks.1.attn1.{name}.weight"]
        assert torch.equal(part, qkv[48 * i: 48 * (i + 1)])
    kv = weights["blocks.1.cross_attn.kv_linear.bias"]
    assert torch.equal(there["transformer_blocks.1.attn2.to_v.bias"], kv[48:])


def test_splitting_costs_no_memory(make_weights) -> None:
    weights = make_weights()
    there = convert_state_dict(weights, "diffusers")
    fused = weights["blocks.0.attn.qkv.weight"].untyped_storage().data_ptr()
    part = there["transformer_blocks.0.attn1.to_v.weight"]
    assert part.untyped_storage().data_ptr() == fused


def test_diffusers_convention_drops_table_and_null_caption(make_weights) -> None:
    weights = make_weights() | {"pos_embed": torch.zeros(1, 256, 48)}
    there = convert_state_dict(weights, "diffusers")
    assert not any("y_embedding" in k or k == "pos_embed" for k in there)
    kept = convert_state_dict(weights, "diffusers", keep_null_caption=True)
    assert torch.equal(kept["caption_projection.y_embedding"],
                       weights["y_embedder.y_embedding"])


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.",
                                    "module."])
def test_prefix_goes_and_other_models_of_a_bundle_with_it(prefix, make_weights) -> None:
    weights = make_weights()
    bundle = {prefix + k: v for k, v in weights.items()}
    if prefix == "model.diffusion_model.":
        bundle |= {"vae.decoder.conv_in.weight": torch.zeros(1),
                   "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(1)}
    assert same(strip_prefix(bundle), weights)
    assert same(convert_state_dict(bundle, "native"), weights)
    assert same(convert_state_dict(bundle, "diffusers"), convert_state_dict(weights, "diffusers"))


def test_already_there_is_left_alone(make_weights) -> None:
    weights = make_weights()
    assert same(convert_state_dict(weights, "native"), weights)
    there = convert_state_dict(weights, "diffusers")
    assert same(convert_state_dict(there, "diffusers"), there)


def test_unknown_names_are_listed(make_weights) -> None:
    extra = {f"blocks.0.attn.extra_{i}.weight": torch.zeros(1) for i in range(7)}
    with pytest.raises(ValueError, match=r"7 names .*extra_0.*extra_4\.weight, \.\.\."):
        convert_state_dict(make_weights() | extra, "diffusers")
    there = convert_state_dict(make_weights(), "diffusers") | {"proj_in.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 names .*proj_in"):
        convert_state_dict(there, "native")
    with pytest.raises(ValueError, match="do not belong"):
        convert_state_dict({"lm_head.weight": torch.zeros(1)}, "native")


def test_kv_compression_has_no_diffusers_form(golden_weights) -> None:
    weights, _ = golden_weights("sigma_1024_kv_conv")
    with pytest.raises(ValueError, match=r"KV-compression"):
        convert_state_dict(weights, "diffusers")
    assert same(convert_state_dict(weights, "native"), weights)


def test_incomplete_projections(make_weights) -> None:
    there = convert_state_dict(make_weights(), "diffusers")
    for gone in ("to_q", "to_k", "to_v"):
        broken = {k: v for k, v in there.items()
                  if k != f"transformer_blocks.0.attn1.{gone}.weight"}
        with pytest.raises(ValueError, match=rf"attn1\.{gone}\.weight missing"):
            convert_state_dict(broken, "native")
    uneven = there | {"transformer_blocks.0.attn2.to_k.weight": torch.zeros(40, 48)}
    with pytest.raises(ValueError, match="one shape"):
        convert_state_dict(uneven, "native")
    native = make_weights() | {"blocks.0.attn.qkv.bias": torch.zeros(143)}
    with pytest.raises(ValueError, match="3 equal parts"):
        convert_state_dict(native, "diffusers")


def test_mixed_layouts_and_wrong_target(make_weights) -> None:
    weights = make_weights()
    with pytest.raises(ValueError, match="mixed"):
        convert_state_dict(weights | convert_state_dict(weights, "diffusers"), "native")
    with pytest.raises(ValueError, match='use "native" or "diffusers"'):
        convert_state_dict(weights, "comfy")


def test_module_names_are_inverse(make_weights) -> None:
    """The two lookups that LoRA and ControlNet files use agree on every module there is."""
    modules = {k.removesuffix(".weight").removesuffix(".bias")
               for k in make_weights(micro_conditioning=True, qk_norm=True)}
    for module in modules - {"y_embedder.y_embedding"}:
        names = diffusers_module(module)
        assert names, module
        for part, name in enumerate(names):
            assert native_module(name) == (module, part, len(names))
    assert diffusers_module("blocks.0.attn.sr") is None
    assert native_module("blocks.0.attn.qkv") is None
