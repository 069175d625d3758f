"""The one door: every good file becomes the right module, every other one a clear refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pixart_core.checkpoint.convert import convert_state_dict
from pixart_core.checkpoint.read import CheckpointError
from pixart_core.checkpoint.write import write_checkpoint
from pixart_core.config import METADATA_KEY, PixArtConfig
from pixart_core.load import load_transformer, main_dtype, open_transformer

STARTER = Path(__file__).parents[2] / "starter"
NAN, INF = float("nan"), float("inf")


def output(model: nn.Module) -> torch.Tensor:
    """One forward pass on inputs that depend on the config alone."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    x = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    caption = torch.randn(2, 5, config.caption_channels, generator=generator)
    micro = {"image_size": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        return model(x, torch.tensor([5.0, 900.0]), caption,
                     **(micro if config.micro_conditioning else {}))


@pytest.mark.parametrize("micro", [False, True])
def test_every_container_gives_the_same_model(micro, make_weights, tmp_path) -> None:
    weights = make_weights(micro_conditioning=micro)
    config = PixArtConfig(hidden_size=48, depth=2, num_heads=4, mlp_hidden_size=96, variant="alpha",
                          caption_channels=24, max_tokens=120, micro_conditioning=micro)
    reference = output(load_transformer(weights, num_heads=4))
    diffusers = convert_state_dict(weights, "diffusers")
    bundle = {"model.diffusion_model." + k: v for k, v in weights.items()}
    metadata = {METADATA_KEY: config.to_json()}
    write_checkpoint(tmp_path / "native.safetensors", weights, metadata)
    write_checkpoint(tmp_path / "bundle.safetensors",
                     bundle | {"vae.decoder.conv_in.weight": torch.zeros(1)}, metadata)
    torch.save({"state_dict": {"module." + k: v for k, v in weights.items()}
                | {"module.pos_embed": torch.zeros(1, 16, 48)}, "epoch": 3},
               tmp_path / "native.pth")
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    write_checkpoint(folder / "transformer" / "diffusion_pytorch_model.safetensors", diffusers, {})
    (folder / "transformer" / "config.json").write_text('{"num_attention_heads": 4}')
    (folder / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    for source, fields in [("native.safetensors", {}), ("bundle.safetensors", {}),
                           ("native.pth", {"num_heads": 4}), ("pipeline", {})]:
        model = load_transformer(tmp_path / source, **fields)
        assert torch.equal(output(model), reference), source
        assert model.config.variant == "alpha"
        assert not model.training
    assert torch.equal(output(load_transformer(diffusers, num_heads=4)), reference)
    wrapped = {"state_dict": weights, "epoch": 1}
    assert torch.equal(output(load_transformer(wrapped, num_heads=4)), reference)


def test_agrees_with_diffusers(tmp_path) -> None:
    """A folder written by diffusers itself gives diffusers' own output."""
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48,
        caption_channels=24, sample_size=64).eval()
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert list(tmp_path.glob("*.index.json"))
    model = load_transformer(tmp_path)
    assert model.config.num_heads == 4 and model.config.image_size == 512
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 64, 64, generator=generator)
    caption = torch.randn(2, 7, 24, generator=generator)
    t = torch.tensor([3, 980])
    with torch.no_grad():
        expected = oracle(x, caption, t, added_cond_kwargs={"resolution": None,
                                                            "aspect_ratio": None}).sample
        error = (model(x, t, caption) - expected).abs().max() / expected.std()
    assert error < 1e-4


@pytest.mark.parametrize("name", ["pixart_starter", "pixart_starter_lcm", "pixart_starter_sigma"])
def test_starter_needs_no_fields(name) -> None:
    model = load_transformer(STARTER / "diffusion_models" / f"{name}.safetensors")
    assert model.config.num_heads == 6
    assert model.config.variant == ("sigma" if name.endswith("sigma") else "alpha")
    assert (model.config.distilled == "lcm") == name.endswith("lcm")
    assert model.x_embedder.proj.weight.dtype is torch.float16


def test_opening_keeps_the_null_caption_and_drops_the_table(make_weights) -> None:
    weights = make_weights() | {"pos_embed": torch.zeros(1, 256, 48)}
    state_dict, config = open_transformer(weights, num_heads=4)
    assert "pos_embed" not in state_dict and "y_embedder.y_embedding" in state_dict
    assert config.num_heads == 4
    assert "pos_embed" in weights  # the caller's dict is left alone
    bare = load_transformer(make_weights(null_caption=False), num_heads=4)
    assert bare.null_caption is None


def test_weights_are_taken_over_not_copied(make_weights, tmp_path) -> None:
    weights = make_weights()
    model = load_transformer(weights, num_heads=4)
    name = "blocks.1.attn.qkv.weight"
    assert model.get_parameter(name).data_ptr() == weights[name].data_ptr()
    assert all(not t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mapped", [True, False])
def test_dtypes(stored, wanted, mapped, make_weights, tmp_path) -> None:
    """Converted weights are the stored ones, rounded once, also when their pages are released."""
    weights = {k: v.to(stored) for k, v in make_weights(hidden_size=96).items()}
    source = weights
    if mapped:
        source = tmp_path / "m.safetensors"
        write_checkpoint(source, weights, {})
    model = load_transformer(source, dtype=wanted, num_heads=4)
    for name, tensor in model.state_dict().items():
        kept = not name.startswith("blocks.") or tensor.ndim < 2 or "table" in name
        # a model may keep small parts in float32; never its block matrices
        assert tensor.dtype in {wanted or stored, *([torch.float32] if kept else [])}, name
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name


def test_eight_bit_floats_become_bfloat16(make_weights, caplog) -> None:
    caplog.set_level("INFO")
    weights = {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in make_weights().items()}
    model = load_transformer(weights, num_heads=4)
    assert model.blocks[0].mlp.fc1.weight.dtype is torch.bfloat16
    assert "bfloat16" in caplog.text
    kept, _ = open_transformer(weights, num_heads=4)
    assert kept["blocks.0.mlp.fc1.weight"].dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_the_null_caption_keeps_its_values_in_any_dtype(dtype, make_weights, tmp_path) -> None:
    """It is an input: rounded to 8 bits it would be another caption. A saved file holds it too."""
    name = "y_embedder.y_embedding"
    weights = {k: v.half() for k, v in make_weights().items()}
    model = load_transformer(weights, dtype=dtype, num_heads=4)
    assert model.blocks[0].mlp.fc1.weight.dtype is dtype
    assert torch.equal(model.null_caption, weights[name].float())
    write_checkpoint(tmp_path / "saved.safetensors",
                     {k: v.half() for k, v in model.state_dict().items()}, {})
    saved, _ = open_transformer(tmp_path / "saved.safetensors", num_heads=4)
    assert torch.equal(saved[name], weights[name])


def test_main_dtype_counts_matrices() -> None:
    mixed = {"a": torch.zeros(2, 2).half(), "b": torch.zeros(2, 2).half(), "c": torch.zeros(2, 2),
             **{f"bias{i}": torch.zeros(2) for i in range(9)}}
    assert main_dtype(mixed) is torch.float16
    with pytest.raises(ValueError, match="dtype="):
        main_dtype({"a": torch.zeros(2, 2, dtype=torch.int8)})


def test_layers_come_from_the_given_namespace(make_weights) -> None:
    class Operations:
        class Linear(nn.Linear):
            pass

        Conv2d, LayerNorm = nn.Conv2d, nn.LayerNorm

    seen = []

    def attention(q, k, v, *args, **kwargs):
        from pixart_core.model.attention import scaled_dot_product

        seen.append(q.shape)
        return scaled_dot_product(q, k, v, *args, **kwargs)

    model = load_transformer(make_weights(), num_heads=4, operations=Operations,
                             attention=attention)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears and all(type(m) is Operations.Linear for m in linears)
    assert torch.equal(output(model), output(load_transformer(make_weights(), num_heads=4)))
    assert len(seen) == 4  # self and cross attention of two blocks


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_missing_weights_are_listed(layout, make_weights) -> None:
    weights = make_weights()
    del weights["blocks.1.cross_attn.proj.bias"], weights["t_embedder.mlp.2.weight"]
    with pytest.raises(CheckpointError, match=r"lacks weights: .*t_embedder\.mlp\.2\.weight") as e:
        open_transformer(convert_state_dict(weights, layout), num_heads=4)
    assert "blocks.1.cross_attn.proj.bias" in str(e.value)


def test_left_over_weights_are_listed(make_weights) -> None:
    weights = make_weights() | {"blocks.0.attn.rel_pos_h": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected weights: blocks\.0\.attn\.rel_pos_h"):
        open_transformer(weights, num_heads=4)
    weights = make_weights(micro_conditioning=True)
    del weights["ar_embedder.mlp.0.weight"]
    with pytest.raises(CheckpointError, match="ar_embedder"):
        open_transformer(weights, num_heads=4)


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "t_block.1.bias",
                                  "final_layer.scale_shift_table", "y_embedder.y_proj.fc2.weight"])
def test_wrong_shapes_are_named(name, make_weights) -> None:
    weights = make_weights()
    weights[name] = torch.zeros(7, 5)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(7, 5\)"):
        open_transformer(weights, num_heads=4)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite(value, dtype, make_weights) -> None:
    weights = {k: v.to(dtype) for k, v in make_weights().items()}
    weights["blocks.1.mlp.fc2.weight"][5, 7] = value
    for load in (open_transformer, load_transformer):
        with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc2\.weight holds NaN"):
            load(weights, num_heads=4)
    assert open_transformer(weights, check_finite=False, num_heads=4)


@pytest.mark.parametrize("names, words", [
    (["controlnet.0.before_proj.weight"], "PixArt ControlNet Loader"),
    (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "LoRA"),
    (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
    (["decoder.conv_in.weight"], "VAE"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion"),
    (["patchify_proj.weight", "adaln_single.linear.weight"], "LTX"),
    (["nothing.of.ours"], "nothing.of.ours"),
])
def test_other_models_are_named(names, words, tmp_path) -> None:
    path = tmp_path / "picked-by-mistake.safetensors"
    write_checkpoint(path, dict.fromkeys(names, torch.ones(1)), {})
    with pytest.raises(CheckpointError, match=rf"picked-by-mistake\.safetensors holds .*{words}"):
        load_transformer(path)


def test_what_cannot_be_known_names_file_and_remedy(make_weights, tmp_path) -> None:
    write_checkpoint(tmp_path / "m.safetensors", make_weights(), {})
    with pytest.raises(ValueError, match=r"m\.safetensors.*num_heads="):
        load_transformer(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="depth=27"):
        load_transformer(tmp_path / "m.safetensors", num_heads=4, depth=27)
    with pytest.raises(CheckpointError, match="state dict"):
        load_transformer({})


_PEAK = """
import sys, torch
from pathlib import Path
from pixart_core.load import load_transformer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

load_transformer(sys.argv[1], dtype=torch.float16, num_heads=4)  # imports
for path in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    load_transformer(path, dtype=torch.float16, num_heads=4)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_never_holds_the_whole_source(make_weights, tmp_path) -> None:
    """A float32 file loaded as float16 needs the float16 copy and little more."""
    large = make_weights(hidden_size=768, mlp_hidden_size=3072, depth=6)
    size = sum(t.nbytes for t in large.values())
    paths = [tmp_path / name for name in ("small.safetensors", "large.safetensors", "large.pth")]
    write_checkpoint(paths[0], make_weights(), {})
    write_checkpoint(paths[1], large, {})
    torch.save(large, paths[2])
    result = subprocess.run([sys.executable, "-c", _PEAK, *map(str, paths)], check=True,
                            capture_output=True, text=True, cwd=STARTER.parent)
    grown = [int(line) for line in result.stdout.split()]
    assert len(grown) == 2
    assert max(grown) < 0.75 * size  # half of it is the result; 1.5 without releasing pages
