"""One LoRA under every naming that trainers use, and files that are none for PixArt."""

import dataclasses
import math
import re

import pytest
import torch
from model_inputs import sizes
from safetensors.torch import load_file, save_file

import pixart_core as pc
from pixart_core.checkpoint import CheckpointError
from pixart_core.checkpoint.convert import diffusers_module, native_modules
from pixart_core.checkpoint.lora import read_lora
from pixart_core.checkpoint.lora_apply import apply_lora
from pixart_core.checkpoint.lora_layer import normalised
from pixart_core.checkpoint.lora_names import find_place
from pixart_core.starter import find_starter

A, B, PEFT = ".lora_A.weight", ".lora_B.weight", "base_model.model."


def tensors_of(adapter):
    """{diffusers path: {PEFT's ending: tensor}} of an adapter's file."""
    out = {}
    for name, tensor in load_file(adapter.folder / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        path, leaf = re.fullmatch(r"(.+?)(\.(?:lora|hada|lokr)_.+)", name).groups()
        out.setdefault(path, {})[leaf] = tensor
    return out


def underscored(path):
    return path.replace(".", "_")


def old_diffusers(path):
    """The attention processors of diffusers before PEFT, where they existed."""
    if ".attn" not in path:
        return path + ".lora"
    path = path.removesuffix(".0")
    block, _, projection = path.rpartition(".")
    return f"{block}.processor.{projection}_lora"


LORA_LAYOUTS = {
    "diffusers": lambda p: ("transformer." + p, A, B),
    "bare": lambda p: (p, A, B),
    "peft": lambda p: (PEFT + p, A, B),
    "peft_default": lambda p: (PEFT + p, ".lora_A.default.weight", ".lora_B.default.weight"),
    "old_script": lambda p: ("unet.base_model.model." + p, A, B),
    "onetrainer": lambda p: ("lora_transformer_" + underscored(p), ".lora_down.weight",
                             ".lora_up.weight"),
    "kohya": lambda p: ("lora_unet_" + underscored(p), ".lora_down.weight", ".lora_up.weight"),
    "lycoris": lambda p: ("lycoris_" + underscored(p), ".lora_down.weight", ".lora_up.weight"),
    "lycoris_full": lambda p: ("lycoris_transformer_" + underscored(p), ".lora_down.weight",
                               ".lora_up.weight"),
    "processors": lambda p: (old_diffusers(p), ".down.weight", ".up.weight"),
    "linear_layer": lambda p: (p, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "dotted_lyco": lambda p: ("transformer." + p, ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_every_layout_is_the_same_lora(peft_adapter, layout):
    """With alpha beside the matrices, merged weights are those of the PEFT folder."""
    adapter = peft_adapter("alpha")
    expected = apply_lora(adapter.weights, adapter.folder)
    renamed = {}
    for path, pair in tensors_of(adapter).items():
        name, down, up = LORA_LAYOUTS[layout](path)
        renamed |= {name + down: pair[A], name + up: pair[B]}
        if layout != "processors":  # those files have none
            renamed[name + ".alpha"] = torch.tensor(7.0)
    lora = read_lora(renamed, alpha=7 if layout == "processors" else None)
    assert not lora.unused and not lora.notes
    merged = apply_lora(adapter.weights, lora)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["loha", "loha_kernel", "lokr", "lokr_both"])
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_transformer_", "transformer."])
def test_lycoris_kinds_with_alpha(peft_adapter, kind, prefix):
    adapter = peft_adapter(kind)
    expected = apply_lora(adapter.weights, adapter.folder)
    renamed = {}
    for path, leaves in tensors_of(adapter).items():
        name = prefix + (path if prefix.endswith(".") else underscored(path))
        renamed |= {name + leaf: tensor for leaf, tensor in leaves.items()}
        renamed[name + ".alpha"] = torch.tensor(7.0)
    merged = apply_lora(adapter.weights, renamed_lora := read_lora(renamed))
    assert not renamed_lora.unused
    rank = {"loha": 4, "loha_kernel": 4, "lokr": 2, "lokr_both": 1}[kind]
    scales = {layer.scale for layer in renamed_lora.layers}
    if scales == {7 / rank}:  # LyCORIS lets a LoKr without factors alone, PEFT scales it
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    assert scales <= {7 / rank, 1.0} and 7 / rank in scales


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "diffusion_model.",
                                    "model.diffusion_model.", ""])
def test_native_names(make_weights, prefix):
    """Fused q, k and v as one LoRA; every module of the model."""
    weights = make_weights()
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, dict(weights)
    for name, weight in weights.items():
        if not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        key = prefix + (underscored(module) if prefix.endswith("_") else module)
        down = torch.randn(2, weight[0].numel(), generator=generator)
        up = torch.randn(len(weight), 2, generator=generator)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                    f"{key}.alpha": torch.tensor(1.0)}
        expected[name] = weight + 0.5 * (up @ down).reshape(weight.shape)
    lora = read_lora(tensors)
    assert not lora.unused
    merged = apply_lora(weights, lora)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)


def test_every_module_is_found_by_either_underscored_name():
    """Of any block, and a part of a fused one as that part."""
    for native in native_modules(13):
        for name in (native, *(diffusers_module(native) or ())):
            dotted, flat = find_place(name), find_place("lycoris_" + underscored(name))
            assert dotted is not None and dotted == flat and dotted.module == native, name


def one(module="transformer.transformer_blocks.0.attn1.to_q", out=48, columns=48, rank=2, **more):
    generator = torch.Generator().manual_seed(3)
    return {f"{module}.lora_down.weight": torch.randn(rank, columns, generator=generator),
            f"{module}.lora_up.weight": torch.randn(out, rank, generator=generator),
            **{f"{module}.{leaf}": tensor for leaf, tensor in more.items()}}


@pytest.mark.parametrize("shape", [(48, 1), (48,), (1, 48)])
def test_dora_of_lyco_files(make_weights, shape):
    """Rows of q alone where it is a part of qkv, or its columns: norms of the changed weight."""
    weights = make_weights()
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(4)) + 0.5
    tensors = one(dora_scale=scale, alpha=torch.tensor(2.0))
    merged = apply_lora(weights, read_lora(tensors))["blocks.0.attn.qkv.weight"]
    down, up = list(tensors.values())[:2]
    changed = weights["blocks.0.attn.qkv.weight"][:48] + up @ down
    axis = 0 if shape == (1, 48) else 1
    expected = changed / changed.norm(dim=axis, keepdim=True) * (
        scale if axis == 0 else scale.reshape(48, 1))
    torch.testing.assert_close(merged[:48], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged[48:], weights["blocks.0.attn.qkv.weight"][48:])


def test_dora_over_the_channels_of_a_convolution():
    """A column of a convolution is an input channel with its whole kernel."""
    weight = torch.randn(6, 4, 2, 2)
    out = normalised(weight, torch.ones(1, 4), weight)
    torch.testing.assert_close(out.transpose(0, 1).flatten(1).norm(dim=1), torch.ones(4))


def test_differences_and_tables(make_weights):
    """Scale-shift tables, biases (of one part, too) and norms, in both namings."""
    weights = make_weights(qk_norm=True)
    changes = {
        "transformer.transformer_blocks.1.scale_shift_table.diff":
            ("blocks.1.scale_shift_table", slice(None)),
        "lycoris_scale_shift_table.diff": ("final_layer.scale_shift_table", slice(None)),
        "lora_transformer_transformer_blocks_0_attn1_to_k.diff_b":
            ("blocks.0.attn.qkv.bias", slice(48, 96)),
        "diffusion_model.blocks.0.attn.q_norm.w_norm": ("blocks.0.attn.q_norm.weight",
                                                        slice(None)),
        "diffusion_model.final_layer.linear.diff": ("final_layer.linear.weight", slice(None)),
    }
    tensors = {key: torch.randn_like(weights[name][rows])
               for key, (name, rows) in changes.items()}
    lora = read_lora(tensors)
    assert not lora.unused
    merged = apply_lora(weights, lora, 0.5)
    for key, (name, rows) in changes.items():
        torch.testing.assert_close(merged[name][rows], weights[name][rows] + tensors[key] / 2)
    touched = {name for name, _ in changes.values()}
    assert all(torch.equal(merged[k], weights[k]) for k in weights if k not in touched)


def test_nothing_is_ignored(make_weights, caplog):
    """What a file holds beyond is named; so are layers that this model has not."""
    tensors = {**one(), **one("transformer.transformer_blocks.0.mystery"),
               "lora_te_encoder_block_0_layer_0_SelfAttention_q.alpha": torch.tensor(1.0),
               "transformer.proj_out.oft_blocks": torch.zeros(2, 2),
               "transformer.caption_projection.linear_1.alpha": torch.tensor(1.0),
               **one("transformer.adaln_single.emb.resolution_embedder.linear_1", 16, 256)}
    lora = read_lora(tensors)
    assert set(lora.unused) == {k for k in tensors if "mystery" in k or "lora_te" in k
                                or "oft" in k or "caption" in k}
    apply_lora(make_weights(), lora)
    for word in ("lora_te_encoder", "mystery", "csize_embedder.mlp.0.weight"):
        assert word in caplog.text


BAD = {
    "nothing": ({"a.lora_A.weight": torch.zeros(2, 2)}, "none of its 1 tensors"),
    "sdxl": (one("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
             "is a LoRA for Stable Diffusion"),
    "flux": ({**one("transformer.transformer_blocks.0.ff.net.0.proj"),
              **one("transformer.single_transformer_blocks.0.attn.to_q")}, "is a LoRA for Flux"),
    "sd3": (one("transformer.transformer_blocks.0.attn.add_q_proj"), "for Stable Diffusion 3"),
    "half": ({k: v for k, v in one().items() if "up" in k}, "lacks down"),
    "loha_half": ({"lycoris_proj_out.hada_w1_a": torch.zeros(2, 2)}, "lacks hada_w1_b"),
    "lokr_half": ({"lycoris_proj_out.lokr_w1_a": torch.zeros(2, 2),
                   "lycoris_proj_out.lokr_w2": torch.zeros(2, 2)}, "lokr_w1_a and lokr_w1_b"),
    "uneven": ({**one(), "transformer.transformer_blocks.0.attn1.to_q.lora_up.weight":
                torch.zeros(48, 3)}, "do not fit each other"),
    "nan": ({k: v * math.nan for k, v in one().items()}, "not finite"),
    "alpha": (one(alpha=torch.tensor(math.inf)), "alpha of .* is not one finite"),
    "magnitude": (one(dora_scale=torch.ones(7, 1)), "magnitude"),
    "only_dora": ({"transformer.proj_out.dora_scale": torch.ones(7, 1)}, "no LoRA"),
    "two": ({**one(), "transformer.transformer_blocks.0.attn1.to_q.lora_A.second.weight":
             torch.ones(2, 48)}, "several adapters"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_lora_for_pixart(tmp_path, case):
    tensors, words = BAD[case]
    file = tmp_path / f"{case}.safetensors"
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=words) as error:
        read_lora(file)
    assert file.name in str(error.value)


def test_a_model_is_no_lora(make_weights):
    with pytest.raises(CheckpointError, match="no LoRA: it holds a PixArt transformer"):
        read_lora(make_weights())


@pytest.mark.parametrize(("tensors", "words"), [
    (one(out=64, columns=64), "another width"),
    (one("transformer.transformer_blocks.5.attn1.to_q"), "6 blocks or more, this one has 2"),
    (one("diffusion_model.blocks.0.attn.sr"), "has none of the weights"),
    (one("diffusion_model.blocks.0.attn.qkv"), "48 x 48 values of blocks.0.attn.qkv"),
], ids=["width", "depth", "absent", "fused"])
def test_loras_of_another_pixart(make_weights, tensors, words):
    """Refused before a weight is changed."""
    with pytest.raises(CheckpointError, match=words):
        apply_lora(make_weights(), read_lora(tensors))


@torch.no_grad()
def test_a_packed_model(tmp_path):
    """GGUF: layers that the LoRA changes are unpacked, the others stay packed."""
    pytest.importorskip("gguf")
    from pixart_core.checkpoint.gguf_write import write_gguf

    weights, config = pc.open_transformer(find_starter().transformer)
    write_gguf(tmp_path / "model.gguf", weights, config, "Q4_0")
    lora = read_lora(one(out=192, columns=192, alpha=torch.tensor(0.1)))
    packed = pc.load_transformer(tmp_path / "model.gguf", dtype=torch.float32)
    dense = pc.load_transformer(pc.open_transformer(tmp_path / "model.gguf")[0],
                                dtype=torch.float32, **dataclasses.asdict(config))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500.0]),
              torch.randn(1, 5, config.caption_channels))
    size = sizes(inputs[0])
    before = packed(*inputs, **size)
    out, expected = (apply_lora(model, lora)(*inputs, **size) for model in (packed, dense))
    assert (before - expected).norm() / expected.norm() > 1e-3
    assert (out - expected).norm() / expected.norm() < 1e-5
    assert packed.blocks[0].attn.qkv.packing is None and packed.blocks[1].attn.qkv.packing
