"""From shapes, metadata and config.json to a config: facts win, guesses are said, nothing more."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixart_core.checkpoint.convert import convert_state_dict
from pixart_core.checkpoint.detect import detect_config
from pixart_core.config import METADATA_KEY, PRESETS, KVCompression, PixArtConfig

GOLDEN = {  # stem: variant, image_size, base_size, pe_interpolation
    "alpha_256": ("alpha", 256, 16, 1.0),
    "alpha_512": ("alpha", 512, 32, 1.0),
    "alpha_1024_landscape": ("alpha", 1024, 64, 2.0),
    "sigma_256": ("sigma", 256, 16, 0.5),
    "sigma_512": ("sigma", 512, 32, 1.0),
    "sigma_1024": ("sigma", 1024, 64, 2.0),
    "sigma_1024_kv_conv": ("sigma", 1024, 64, 2.0),
    "sigma_1024_qknorm_kv": ("sigma", 1024, 64, 2.0),
}


def table(base_size: int, interpolation: float, width: int = 48,
          dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """pos_embed as the official code stores it."""
    from pixart_core.model.embedders import position_table

    return position_table(base_size, base_size, width, base_size / interpolation).to(dtype)


@pytest.mark.parametrize("stem", GOLDEN)
def test_official_weights(stem, golden_weights) -> None:
    weights, meta = golden_weights(stem)
    weights.setdefault("pos_embed", table(*GOLDEN[stem][2:]))
    config = detect_config(weights, num_heads=2)
    found = (config.variant, config.image_size, config.base_size, config.pe_interpolation)
    assert found == GOLDEN[stem]
    assert (config.hidden_size, config.depth, config.caption_channels) == (48, 4, 32)
    assert config.micro_conditioning == meta.get("micro_conditioning", False)
    assert config.qk_norm == meta.get("qk_norm", False)
    expected = meta.get("kv_compression")
    assert config.kv_compression == (KVCompression(**expected) if expected else None)


@pytest.mark.parametrize(("name", "dtype"), [
    (name, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for name, preset in PRESETS.items()
    if preset.base_size <= 64 or dtype is torch.float16  # one is enough for the largest table
])
def test_stored_table_of_every_released_size(name, dtype, make_weights) -> None:
    preset = PRESETS[name]
    weights = make_weights(micro_conditioning=preset.micro_conditioning,
                           max_tokens=preset.max_tokens)
    weights["pos_embed"] = table(preset.base_size, preset.pe_interpolation, dtype=dtype)
    config = detect_config(weights, num_heads=4)
    for field in ("variant", "image_size", "base_size", "pe_interpolation", "max_tokens"):
        assert getattr(config, field) == getattr(preset, field), field


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(width=st.integers(1, 6).map(lambda n: 12 * n), depth=st.integers(1, 6),
       mlp=st.integers(1, 99), caption=st.integers(1, 40), tokens=st.integers(1, 77),
       micro=st.booleans(), qk_norm=st.booleans(), patch=st.sampled_from([1, 2, 4]),
       channels=st.integers(1, 16), diffusers=st.booleans(),
       prefix=st.sampled_from(["", "model.diffusion_model.", "transformer."]))
def test_every_size_is_read_from_shapes(make_weights, width, depth, mlp, caption, tokens, micro,
                                        qk_norm, patch, channels, diffusers, prefix) -> None:
    wanted = {"hidden_size": width, "depth": depth, "mlp_hidden_size": mlp,
              "caption_channels": caption, "max_tokens": tokens, "micro_conditioning": micro,
              "qk_norm": qk_norm, "patch_size": patch, "in_channels": channels,
              "out_channels": 2 * channels, "num_heads": 3}
    weights = make_weights(**wanted)
    if diffusers:
        weights = convert_state_dict(weights, "diffusers", keep_null_caption=True)
    config = detect_config({prefix + k: v for k, v in weights.items()}, num_heads=3)
    assert {k: getattr(config, k) for k in wanted} == wanted


@pytest.mark.parametrize("factor", [2, 3])
def test_kv_compression_by_convolution_is_seen(factor, make_weights) -> None:
    wanted = KVCompression("conv", factor, (1, 3))
    weights = make_weights(depth=4, kv_compression=wanted)
    assert detect_config(weights, num_heads=4).kv_compression == wanted
    same = {"sampling": "conv", "factor": factor, "layers": [3, 1]}
    assert detect_config(weights, num_heads=4, kv_compression=same).kv_compression == wanted
    other = {"sampling": "ave", "factor": factor, "layers": [1, 3]}
    with pytest.raises(ValueError, match="kv_compression"):
        detect_config(weights, num_heads=4, kv_compression=other)


def test_kv_compression_without_weights(make_weights, caplog) -> None:
    """"ave" and "uniform" leave no trace in the weights; only metadata or the caller know."""
    weights = make_weights()
    ave = {"sampling": "ave", "factor": 2, "layers": [0, 1]}
    assert detect_config(weights, num_heads=4).kv_compression is None
    found = detect_config(weights, num_heads=4, kv_compression=ave).kv_compression
    assert found == KVCompression("ave", 2, (0, 1))
    metadata = {METADATA_KEY: json.dumps({"kv_compression": ave, "num_heads": 4})}
    assert detect_config(weights, metadata).kv_compression == KVCompression("ave", 2, (0, 1))
    conv = ave | {"sampling": "conv"}
    with pytest.raises(ValueError, match=r"attn\.sr\.weight is missing"):
        detect_config(weights, num_heads=4, kv_compression=conv)
    metadata = {METADATA_KEY: json.dumps({"kv_compression": conv, "num_heads": 4})}
    assert detect_config(weights, metadata).kv_compression is None
    assert "the weights count" in caplog.text


def test_heads_are_never_guessed(make_weights) -> None:
    weights = make_weights()
    with pytest.raises(ValueError, match="num_heads="):
        detect_config(weights)
    assert detect_config(weights, num_heads=6).num_heads == 6
    assert detect_config(weights, {METADATA_KEY: '{"num_heads": 3}'}).num_heads == 3
    assert detect_config(weights, {METADATA_KEY: '{"num_heads": 3}'}, num_heads=6).num_heads == 6
    assert detect_config(weights, config={"num_attention_heads": 8}).num_heads == 8
    assert detect_config(weights, config={"attention_head_dim": 24}).num_heads == 2
    with pytest.raises(ValueError, match="does not divide"):
        detect_config(weights, num_heads=5)
    with pytest.raises(ValueError, match="does not divide"):
        detect_config(weights, {METADATA_KEY: '{"num_heads": 7}'})


def test_released_width_has_sixteen_heads() -> None:
    from pixart_core.model.transformer import PixArtTransformer

    weights = PixArtTransformer(PixArtConfig(depth=1), device="meta").state_dict()
    assert detect_config(weights).num_heads == 16


@pytest.mark.parametrize("field, wrong", [
    ("depth", 27), ("hidden_size", 96), ("caption_channels", 4096), ("max_tokens", 300),
    ("patch_size", 4), ("in_channels", 8), ("micro_conditioning", True), ("qk_norm", True),
    ("mlp_hidden_size", 1),
])
def test_shapes_beat_everyone(field, wrong, make_weights, caplog) -> None:
    """A caller who contradicts a shape is told; a file that does is overruled, with a word."""
    weights = make_weights()
    with pytest.raises(ValueError, match=rf"{field}={wrong!r} was given"):
        detect_config(weights, num_heads=4, **{field: wrong})
    metadata = {METADATA_KEY: json.dumps({field: wrong, "num_heads": 4})}
    config = detect_config(weights, metadata)
    assert getattr(config, field) != wrong
    assert field in caplog.text


def test_variant_in_order_of_trust(make_weights, caplog) -> None:
    bare = convert_state_dict(make_weights(), "diffusers")
    caplog.set_level(logging.INFO)

    def variant(**given) -> str:
        return detect_config(bare, num_heads=4, **given).variant

    assert variant() == "sigma"
    assert len([r for r in caplog.records if "variant='alpha'" in r.getMessage()]) == 1
    caplog.clear()
    assert variant(variant="alpha") == "alpha"
    assert variant(config={"sample_size": 32, "interpolation_scale": 0.5}) == "sigma"
    assert variant(config={"sample_size": 32, "interpolation_scale": None}) == "alpha"
    assert variant(config={"sample_size": 256}) == "sigma"
    assert variant(config={"_name_or_path": "PixArt-alpha/PixArt-XL-2-512x512"}) == "alpha"
    assert variant(pipeline_class="PixArtSigmaPipeline") == "sigma"
    assert variant(pipeline_class="PixArtAlphaPipeline") == "alpha"
    assert variant(metadata={METADATA_KEY: '{"variant": "alpha"}'}) == "alpha"
    assert variant(metadata={METADATA_KEY: '{"variant": "alpha"}'}, variant="sigma") == "sigma"
    assert "variant=" not in caplog.text
    assert detect_config(make_weights(max_tokens=120), num_heads=4).variant == "alpha"
    assert detect_config(make_weights(max_tokens=300), num_heads=4).variant == "sigma"
    micro = convert_state_dict(make_weights(micro_conditioning=True), "diffusers")
    assert detect_config(micro, num_heads=4).variant == "alpha"


def test_a_name_with_both_words_goes_by_the_model() -> None:
    """Sigma's repositories stand under the owner "PixArt-alpha"."""
    from pixart_core.checkpoint.detect import detect_config as detect
    from pixart_core.model.transformer import PixArtTransformer

    weights = PixArtTransformer(PixArtConfig(depth=1), device="meta",
                                null_caption=False).state_dict()
    name = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    assert detect(weights, config={"_name_or_path": name, "sample_size": 64}).variant == "sigma"


def test_tokens_follow_the_variant_without_a_null_caption(make_weights) -> None:
    bare = make_weights(null_caption=False)
    assert detect_config(bare, num_heads=4, variant="alpha").max_tokens == 120
    assert detect_config(bare, num_heads=4, variant="sigma").max_tokens == 300
    assert detect_config(bare, num_heads=4, max_tokens=77).max_tokens == 77


@pytest.mark.parametrize("variant, size, interpolation", [
    ("alpha", 256, 1.0), ("alpha", 512, 1.0), ("alpha", 1024, 2.0),
    ("sigma", 256, 0.5), ("sigma", 512, 1.0), ("sigma", 1024, 2.0), ("sigma", 2048, 4.0),
])
def test_image_size_alone_implies_the_released_model(variant, size, interpolation, make_weights):
    config = detect_config(make_weights(null_caption=False), num_heads=4, variant=variant,
                           image_size=size)
    assert (config.base_size, config.pe_interpolation) == (size // 16, interpolation)


def test_positions_in_order_of_trust(make_weights) -> None:
    weights = make_weights(max_tokens=300)

    def positions(extra=(), **given) -> tuple:
        config = detect_config(weights | dict(extra), num_heads=4, **given)
        return config.image_size, config.base_size, config.pe_interpolation

    beside = {"sample_size": 64, "interpolation_scale": None}
    stored = {METADATA_KEY: '{"image_size": 2048, "base_size": 128, "pe_interpolation": 4}'}
    small = {"pos_embed": table(16, 0.5)}
    assert positions() == (1024, 64, 2.0)
    assert positions(config=beside) == (512, 32, 1.0)
    assert positions(config=beside, metadata=stored) == (2048, 128, 4.0)
    assert positions(small, config=beside, metadata=stored) == (256, 16, 0.5)
    assert positions(small, metadata=stored, image_size=512) == (512, 32, 1.0)
    assert positions(small, pe_interpolation=1) == (256, 16, 1.0)
    assert positions(pe_interpolation=1) == (1024, 64, 1.0)
    assert positions(config={"sample_size": 32, "interpolation_scale": 0.5}) == (256, 16, 0.5)
    assert positions(config={"_class_name": "T5EncoderModel", "sample_size": 64})[0] == 1024


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(base=st.integers(2, 24), sixteenths=st.integers(3, 160),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_stored_table_is_read_back(make_weights, base, sixteenths, dtype) -> None:
    """The stretch is known up to a period of the sine, so from 3/16 on."""
    weights = make_weights() | {"pos_embed": table(base, sixteenths / 16, dtype=dtype)}
    config = detect_config(weights, num_heads=4)
    assert config.base_size == base
    assert math.isclose(config.pe_interpolation, sixteenths / 16, rel_tol=0.03)
    if dtype is torch.float32:
        assert config.pe_interpolation == sixteenths / 16


@pytest.mark.parametrize("bad", [torch.zeros(1, 256, 48), torch.ones(1, 256, 48),
                                 torch.full((1, 256, 48), float("nan")), torch.zeros(1, 255, 48),
                                 torch.zeros(1, 256, 47), torch.zeros(48), torch.zeros(()),
                                 torch.zeros(1, 1, 48), torch.zeros(2, 256, 48)])
def test_a_table_that_is_none_is_left_aside(bad, make_weights) -> None:
    assert detect_config(make_weights() | {"pos_embed": bad}, num_heads=4).image_size == 1024


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "final_layer.linear.weight",
                                  "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.fc1.weight"])
def test_what_is_missing_is_named(name, make_weights) -> None:
    weights = make_weights()
    del weights[name]
    with pytest.raises(ValueError, match=name):
        detect_config(weights, num_heads=4)
    with pytest.raises(ValueError, match="missing"):
        detect_config({}, num_heads=4)
    weights[name] = torch.zeros(3)
    with pytest.raises(ValueError, match="dimensions were expected"):
        detect_config(weights, num_heads=4)


def test_a_gap_between_blocks(make_weights) -> None:
    weights = {k.replace("blocks.1.", "blocks.999999999999."): v
               for k, v in make_weights(depth=3).items()}
    with pytest.raises(ValueError, match=r"blocks \[1\]"):
        detect_config(weights, num_heads=4)


@pytest.mark.parametrize("fields", [
    {"num_heads": "four"}, {"num_heads": 4.5}, {"num_heads": True}, {"num_heads": -1},
    {"num_heads": float("inf")}, {"num_heads": 4, "image_size": 0},
    {"num_heads": 4, "variant": "beta"}, {"num_heads": 4, "variant": 3},
    {"num_heads": 4, "micro_conditioning": "no"}, {"num_heads": 4, "pe_interpolation": []},
    {"num_heads": 4, "kv_compression": "ave"}, {"num_heads": 4, "kv_compression": {"factor": 2}},
    {"num_heads": 4, "kv_compression": {"sampling": "ave", "factor": "2", "layers": [0]}},
    {"num_heads": 4, "kv_compression": {"sampling": "ave", "factor": 2, "layers": [99]}},
    {"num_heads": 4, "kv_compression": {"sampling": "ave", "factor": 2, "layers": ["x"]}},
    {"num_heads": 4, "distilled": 1},
])
def test_nonsense_is_refused_wherever_it_stands(fields, make_weights) -> None:
    weights = make_weights()
    with pytest.raises(ValueError):
        detect_config(weights, **fields)
    with pytest.raises(ValueError):
        detect_config(weights, {METADATA_KEY: json.dumps(fields)})


def test_unknown_field_and_broken_metadata(make_weights) -> None:
    with pytest.raises(ValueError, match="head_count"):
        detect_config(make_weights(), head_count=4)
    for text in ("{", "[]", "null"):
        with pytest.raises(ValueError, match=METADATA_KEY):
            detect_config(make_weights(), {METADATA_KEY: text}, num_heads=4)


@settings(max_examples=60, deadline=None)
@given(beside=st.dictionaries(
    st.sampled_from(["sample_size", "interpolation_scale", "num_attention_heads",
                     "attention_head_dim", "_name_or_path", "_class_name",
                     "use_additional_conditions", "cross_attention_dim"]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                 lambda inner: st.lists(inner, max_size=2), max_leaves=3)))
def test_any_config_json_is_met_with_a_config_or_a_clear_error(make_weights, beside) -> None:
    try:
        config = detect_config(make_weights(), config=beside, num_heads=4)
    except ValueError:
        return
    assert config.hidden_size == 48
