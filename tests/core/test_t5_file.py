"""read_t5: every layout of a T5 encoder becomes the same weights, sizes and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_core.text.t5_file import T5Config, expected_shapes, inspect_t5, read_t5

STARTER = Path(__file__).parents[2] / "starter"
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
STARTER_CONFIG = T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, vocab_size=256)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return load_file(STARTER / "text_encoders" / "t5" / "model.safetensors")


@pytest.fixture
def save(tmp_path):
    def write(tensors, name="t5.safetensors"):
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return write


def assert_same(state_dict, expected):
    assert state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state_dict[name], tensor, rtol=0, atol=0)


def test_folder_and_single_file_are_the_same(weights):
    folder = read_t5(STARTER / "text_encoders" / "t5")
    single = read_t5(STARTER / "text_encoders" / "t5_starter.safetensors")
    assert folder.config == single.config == STARTER_CONFIG
    assert folder.spiece_model == single.spiece_model
    assert folder.spiece_model == (STARTER / "text_encoders" / "t5" / "spiece.model").read_bytes()
    assert folder.dtype == single.dtype == torch.float16
    for file in (folder, single):
        assert_same(file.state_dict, weights)


@pytest.mark.parametrize("prefix", ["text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "x."])
def test_bundles_are_stripped_to_the_encoder(weights, save, prefix):
    bundle = {prefix + name: tensor for name, tensor in weights.items()}
    bundle[f"{prefix}encoder.embed_tokens.weight"] = weights["shared.weight"]
    bundle[f"{prefix}decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(4, 4)
    bundle[f"{prefix}lm_head.weight"] = torch.zeros(4, 4)
    bundle["model.diffusion_model.x_embedder.proj.weight"] = torch.zeros(4, 4)
    assert_same(read_t5(save(bundle)).state_dict, weights)


def test_embedding_under_its_other_name(weights, save):
    renamed = {k.replace("shared", "encoder.embed_tokens"): v for k, v in weights.items()}
    assert_same(read_t5(save(renamed)).state_dict, weights)


def test_sharded_bin_folder(weights, tmp_path):
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:10],
              "pytorch_model-00002-of-00002.bin": names[10:]}
    for shard, inside in shards.items():
        torch.save({name: weights[name] for name in inside}, tmp_path / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_t5(tmp_path).state_dict, weights)


@pytest.mark.parametrize("inside", ["", "text_encoder"])
def test_pipeline_folder_with_its_tokenizer_next_door(tmp_path, inside):
    shutil.copytree(STARTER / "text_encoders" / "t5", tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.move(tmp_path / "text_encoder" / "spiece.model", tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    file = read_t5(tmp_path / inside)
    assert file.config == STARTER_CONFIG
    assert file.tokenizer().vocab_size == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_to_one_dtype(weights, dtype):
    file = read_t5(STARTER / "text_encoders" / "t5", dtype)
    assert file.dtype == dtype
    assert_same(file.state_dict, {name: tensor.to(dtype) for name, tensor in weights.items()})


def test_float16_keeps_wo_in_float32(weights, save):
    """A float32 file must reach wo unrounded: rounding to float16 first would be lost for good."""
    full = {name: tensor.float() * 1.0001 for name, tensor in weights.items()}
    file = read_t5(save(full), torch.float16)
    for name, tensor in file.state_dict.items():
        wide = name.endswith(".wo.weight")
        torch.testing.assert_close(tensor, full[name] if wide else full[name].half(),
                                   rtol=0, atol=0)


def is_matrix(name: str) -> bool:
    return ("SelfAttention" in name or "DenseReluDense" in name) and "bias" not in name


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_becomes_bfloat16_exactly(weights, save, fp8):
    small = {n: t.to(fp8) if is_matrix(n) else t for n, t in weights.items()}
    file = read_t5(save(small))
    assert file.dtype == torch.bfloat16
    for name in filter(is_matrix, weights):
        torch.testing.assert_close(file.state_dict[name].float(), small[name].float(),
                                   rtol=0, atol=0)


def test_mixed_files_become_one_dtype(weights, save):
    """Norms in float32 beside float16 weights would make every layer compute in float32."""
    mixed = {n: t.float() if "layer_norm" in n else t for n, t in weights.items()}
    assert {t.dtype for t in read_t5(save(mixed)).state_dict.values()} == {torch.float16}


def scaled_fp8(weights, layout):
    """Weights as ComfyUI writes them: quantised to the full float8 range, with their scales."""
    tensors = {}
    for name, tensor in weights.items():
        if not is_matrix(name):
            tensors[name] = tensor
            continue
        layer, rows = name.removesuffix(".weight"), layout == "rows"
        peak = tensor.float().abs()
        scale = (peak.amax(1, keepdim=True) if rows else peak.amax()) / 448
        tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        if layout == "marker":
            tensors[f"{layer}.scale_weight"] = scale.reshape(1)
            tensors[f"{layer}.scale_input"] = torch.ones(1)
        else:
            said = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.weight_scale"] = scale
            tensors[f"{layer}.input_scale"] = torch.ones(())
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    if layout == "marker":
        tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return tensors


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize("layout", ["marker", "tensor", "rows"])
def test_scaled_fp8_is_dequantised(weights, save, layout, prefix):
    packed = {prefix + name: tensor for name, tensor in scaled_fp8(weights, layout).items()}
    file = read_t5(save(packed), torch.float32)
    state_dict = file.state_dict | {name: one.dense() for name, one in file.packed.items()}
    assert bool(file.packed) is (layout != "marker")  # these stay as they are stored
    assert state_dict.keys() == weights.keys()
    for name in filter(is_matrix, weights):
        error = (state_dict[name] - weights[name].float()).abs()
        # e4m3 has 3 bits behind the leading one, and a smallest step of 2**-9 below 2**-6
        peak = weights[name].float().abs()
        bound = torch.maximum(peak * 2**-4, peak.amax() / 448 * 2**-10) * 1.001
        assert (error <= bound).all()


def test_quantisations_that_cannot_be_read_are_named(weights, save):
    layer = QUERY.removesuffix(".weight")
    said = torch.tensor(list(b'{"format": "nvfp9"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match="quantised as 'nvfp9'"):
        read_t5(save(weights | {f"{layer}.comfy_quant": said}))
    with pytest.raises(ValueError, match="does not say how the layer is quantised"):
        read_t5(save(weights | {f"{layer}.comfy_quant": said[:-1]}))
    with pytest.raises(ValueError, match=r"is torch\.int8, a quantisation"):
        read_t5(save(weights | {QUERY: weights[QUERY].to(torch.int8)}))
    with pytest.raises(ValueError, match="no such weight"):
        read_t5(save(weights | {"encoder.block.7.nothing.scale_weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="one number, or one per row"):
        read_t5(save(weights | {f"{layer}.scale_weight": torch.ones(7)}))


def test_config_json_gives_only_what_shapes_do_not_tell(tmp_path):
    shutil.copytree(STARTER / "text_encoders" / "t5", tmp_path, dirs_exist_ok=True)
    said = {"d_model": 128, "num_heads": 99, "num_layers": 99, "feed_forward_proj": "gated-silu",
            "layer_norm_epsilon": 1e-5, "relative_attention_max_distance": 64}
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = read_t5(tmp_path).config
    assert (config.num_heads, config.num_layers) == (4, 3)
    assert (config.activation, config.layer_norm_epsilon) == ("silu", 1e-5)
    assert config.relative_attention_max_distance == 64


def test_config_json_of_another_model_in_the_same_folder_is_ignored(weights, save, tmp_path):
    (tmp_path / "config.json").write_text('{"d_model": 7, "layer_norm_epsilon": 0.5}')
    assert read_t5(save(weights)).config == STARTER_CONFIG


def test_ungated_t5(save):
    config = T5Config(16, 4, 32, 2, 4, 64, gated=False, activation="relu")
    tensors = {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}
    assert read_t5(save(tensors)).config == config


def test_missing_tokenizer_names_three_ways(weights, save):
    file = read_t5(save(weights))
    with pytest.raises(ValueError, match=r"(?s)tokenizer=<path.*beside the weights.*spiece_model"):
        file.tokenizer()


@pytest.mark.parametrize(("rows", "family"), [(256384, "umT5"), (250112, "mT5")])
def test_foreign_vocabularies_are_named(weights, save, rows, family):
    big = weights | {"shared.weight": torch.zeros(rows, 128, dtype=torch.float16)}
    with pytest.raises(ValueError, match=rf"is a {family} text encoder.*T5 v1\.1 XXL \(32128"):
        read_t5(save(big))


def test_a_bias_in_every_block_is_umt5(weights, save):
    with pytest.raises(ValueError, match=r"umT5.*relative_attention_bias"):
        read_t5(save(weights | {BIAS.format(1): weights[BIAS.format(0)]}))


@pytest.mark.parametrize(("name", "said"), [
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "a CLIP text encoder"),
    ("t_block.1.weight", "a PixArt transformer"),
    ("something.else", "not known to PixArt"),
    ("decoder.block.0.layer.0.SelfAttention.q.weight", "decoder of a T5 without its encoder"),
])
def test_other_models_are_named(save, name, said):
    with pytest.raises(ValueError, match=rf"{said}.*T5 v1\.1 XXL"):
        read_t5(save({name: torch.zeros(2, 2)}))


@pytest.mark.parametrize("name", ["shared.weight", BIAS.format(0),
                                  "encoder.final_layer_norm.weight",
                                  "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"])
def test_missing_weight_is_named(weights, save, name):
    del weights[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        read_t5(save(weights))


def test_unknown_and_misshapen_weights_are_named(weights, save):
    with pytest.raises(ValueError, match=r"has encoder\.block\.0\.extra"):
        read_t5(save(weights | {"encoder.block.0.extra": torch.zeros(2)}))
    wo = "encoder.block.2.layer.1.DenseReluDense.wo.weight"
    with pytest.raises(ValueError, match=r"wo\.weight has shape \(256, 128\), \(128, 256\) was"):
        read_t5(save(weights | {wo: weights[wo].T}))


def test_degenerate_files_are_refused(weights, save):
    """A file made to hang or crash the reader: empty tensors, a block numbered a billion."""
    with pytest.raises(ValueError, match="a matrix was expected"):
        read_t5(save(weights | {BIAS.format(0): torch.zeros(32, 0)}))
    far = {"encoder.block.999999999999.layer.0.layer_norm.weight": torch.ones(128)}
    with pytest.raises(ValueError, match=r"lacks encoder\.block\.3\."):
        read_t5(save(weights | far))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(weights, save, value):
    weights[QUERY][3, 5] = value
    with pytest.raises(ValueError, match=rf"{QUERY} holds numbers that are not finite"):
        read_t5(save(weights))


def test_inspect_sees_sizes_and_faults_without_the_weights(weights, save):
    """The host's loader asks for the sizes first; a NaN is met only when weights are read."""
    assert inspect_t5(STARTER / "text_encoders" / "t5") == STARTER_CONFIG
    weights[QUERY][0, 0] = float("nan")
    assert inspect_t5(save(weights)) == STARTER_CONFIG
    with pytest.raises(ValueError, match=r"is torch\.int8, a quantisation"):
        inspect_t5(save(weights | {QUERY: weights[QUERY].to(torch.int8)}))


def test_two_encoders_in_one_file(weights, save):
    twice = {prefix + name: t for name, t in weights.items() for prefix in ("a.", "b.")}
    with pytest.raises(ValueError, match=r"several T5 encoders \(under a\., b\.\)"):
        read_t5(save(twice))
