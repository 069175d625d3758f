"""What the tests of the engine and of the host share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "proj_out", "ff.net.0.proj", "ff.net.2", "proj",
           "linear", "linear_1", "linear_2"]  # as in PixArt's own training scripts
PATTERNS = {"alpha_pattern": {"attn1.to_q": 3, "transformer_blocks.1.ff.net.2": 11},
            "rank_pattern": {"to_v": 2}}


class PeftAdapter(NamedTuple):
    """A random adapter that peft saved in `folder`, the native `weights` of its base, inputs of
    the network, and what peft gives for them: with the adapter and without."""

    folder: Path
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    out: Tensor
    plain: Tensor


def _configs() -> dict[str, Any]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    lora = {"r": 4, "lora_alpha": 7, "target_modules": LINEARS}
    lycoris = {"alpha": 7, "target_modules": LINEARS}
    return {
        "alpha": LoraConfig(**lora),
        "patterns": LoraConfig(**lora, **PATTERNS),
        "rslora": LoraConfig(**lora, use_rslora=True),
        "dora": LoraConfig(**lora, use_dora=True),
        "biases": LoraConfig(**lora, lora_bias=True),
        "whole": LoraConfig(r=4, lora_alpha=7, target_modules=LINEARS[:4], bias="all",
                            modules_to_save=["proj_out"]),
        "loha": LoHaConfig(r=4, **lycoris),
        "loha_kernel": LoHaConfig(r=4, use_effective_conv2d=True, **lycoris),
        "lokr": LoKrConfig(r=2, **lycoris),
        "lokr_full": LoKrConfig(r=64, **lycoris),
        "lokr_both": LoKrConfig(r=1, decompose_both=True, decompose_factor=4,
                                use_effective_conv2d=True, **lycoris),
    }


@pytest.fixture(scope="session")
def peft_adapter(tmp_path_factory: pytest.TempPathFactory):
    """PeftAdapter of a kind (a key of _configs), on diffusers' transformer of width 32."""
    from diffusers import PixArtTransformer2DModel
    from peft import get_peft_model

    from pixart_core import convert_state_dict

    made: dict[str, PeftAdapter] = {}

    def make(kind: str) -> PeftAdapter:
        if kind in made:
            return made[kind]
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32,
            caption_channels=16, sample_size=128, interpolation_scale=2,
            use_additional_conditions=False).eval()
        native = convert_state_dict(model.state_dict(), to="native")
        weights = {name: tensor.clone() for name, tensor in native.items()}
        inputs = {"x": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([300.0, 700.0]),
                  "caption": torch.randn(2, 5, 16)}

        @torch.no_grad()
        def output(network: torch.nn.Module) -> Tensor:
            return network(inputs["x"], encoder_hidden_states=inputs["caption"],
                           timestep=inputs["timestep"],
                           added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample

        plain = output(model)
        adapted = get_peft_model(model, _configs()[kind])
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it takes biases for tensors that were cut
            adapted.save_pretrained(folder)
        made[kind] = PeftAdapter(folder, weights, inputs, output(adapted), plain)
        return made[kind]

    return make
