"""Every kind of file a user might pick by mistake is called by its name."""

from __future__ import annotations

import pytest
import torch

from pixart_core.checkpoint.convert import convert_state_dict
from pixart_core.checkpoint.header import CheckpointError
from pixart_core.checkpoint.identify import KINDS, explain, identify, require_kind

# names as the published files of each kind have them
FOREIGN = {
    "lora": ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
             "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"],
    "oft": ["lycoris_blocks_0_attn_qkv.oft_blocks", "lycoris_blocks_0_attn_qkv.alpha"],
    "glora": [f"lycoris_blocks_0_attn_qkv.{part}.weight" for part in ("a1", "a2", "b1", "b2")],
    "controlnet": ["base_model.x_embedder.proj.weight", "base_model.t_block.1.weight",
                   "controlnet.0.before_proj.weight", "controlnet.0.copied_block.attn.qkv.weight"],
    "controlnet-diffusers": ["controlnet_blocks.0.before_proj.weight",
                             "controlnet_blocks.0.transformer_block.attn1.to_q.weight"],
    "t5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
           "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    "umt5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
             "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"],
    "clip": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "vae": ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"],
    "taesd": ["taesd_decoder.1.weight", "taesd_encoder.0.weight"],
    "sdxl": ["model.diffusion_model.input_blocks.0.0.weight",
             "model.diffusion_model.label_emb.0.0.weight",
             "first_stage_model.decoder.conv_in.weight"],
    "sd": ["model.diffusion_model.input_blocks.0.0.weight",
           "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
           "first_stage_model.decoder.conv_in.weight"],
    "flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "sd3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "ltx": ["patchify_proj.weight", "adaln_single.linear.weight",
            "caption_projection.linear_1.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "sana": ["t_block.1.weight", "x_embedder.proj.weight", "blocks.0.mlp.inverted_conv.conv.weight",
             "blocks.0.cross_attn.kv_linear.weight", "blocks.0.scale_shift_table"],
    "svdquant": ["blocks.0.attn.qkv.qweight", "blocks.0.attn.qkv.wscales", "t_block.1.weight"],
    "hed": ["norm", "block1.convs.0.weight", "block5.projection.weight"],
    "unknown": ["something.else.weight"],
}


def empty(names: list[str]) -> dict[str, torch.Tensor]:
    return dict.fromkeys(names, torch.zeros(1))


@pytest.mark.parametrize("names", [["0.weight", "0.bias", "1.conv.0.weight", "2.weight"],
                                   ["1.weight", "1.bias", "3.conv.0.weight", "7.weight"]])
def test_half_of_a_taesd(names) -> None:
    """Files of an encoder or a decoder alone are numbered and say no more."""
    assert identify(empty(names)) == "taesd"


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind) -> None:
    assert identify(empty(FOREIGN[kind])) == kind
    assert identify(empty(FOREIGN[kind][::-1])) == kind  # whatever the order of names


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.",
                                    "transformer.", "model."])
def test_pixart_under_every_prefix(prefix, make_weights) -> None:
    weights = make_weights()
    bundle = {"vae.decoder.conv_in.weight": torch.zeros(1),
              "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight":
                  torch.zeros(1)}
    native = {prefix + k: v for k, v in weights.items()}
    assert identify(native | bundle) == "pixart"
    there = convert_state_dict(weights, "diffusers")
    assert identify({prefix + k: v for k, v in there.items()}) == "pixart-diffusers"


def test_diffusers_ltx_is_not_pixart() -> None:
    """LTX-Video has most of the names; diffusers' own module is the oracle."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.LTXVideoTransformer3DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_channels=16,
        cross_attention_dim=16)
    assert identify(model.state_dict()) == "ltx"


def test_message_names_the_evidence_and_the_way_out() -> None:
    with pytest.raises(CheckpointError) as caught:
        require_kind(empty(FOREIGN["controlnet"]), ("pixart",), "alpha_512_control.pth")
    assert str(caught.value) == (
        "alpha_512_control.pth holds a PixArt ControlNet (controlnet.0.before_proj found); "
        "load it with PixArt ControlNet Loader")
    assert "something.else.weight" in explain(empty(FOREIGN["unknown"]))


def test_every_kind_has_a_test() -> None:
    tested = set(FOREIGN) | {"pixart", "pixart-diffusers"}
    assert {kind.name for kind in KINDS} <= tested
