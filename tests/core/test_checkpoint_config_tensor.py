"""The config among a file's tensors, as models saved by ComfyUI's own nodes carry it."""

import pytest
import torch
from safetensors.torch import save_file

from pixart_core.checkpoint import CheckpointError
from pixart_core.checkpoint.config_tensor import config_tensor
from pixart_core.checkpoint.read import read_checkpoint
from pixart_core.config import METADATA_KEY, PixArtConfig
from pixart_core.load import read_transformer

CONFIG = PixArtConfig(hidden_size=48, depth=2, num_heads=3, mlp_hidden_size=96,
                      caption_channels=24, max_tokens=120, variant="alpha", image_size=256,
                      base_size=16, pe_interpolation=1.0)


def bundle(make_weights, tensor):
    weights = make_weights(hidden_size=48, num_heads=3, variant="alpha")
    return {**{f"model.diffusion_model.{k}": v for k, v in weights.items()}, METADATA_KEY: tensor}


def test_it_says_what_shapes_do_not(make_weights, tmp_path):
    """Protects saved merges: heads, positions and variant, from a file and from a state dict."""
    tensors = bundle(make_weights, config_tensor(CONFIG.to_json()))
    save_file(tensors, tmp_path / "saved.safetensors")
    assert read_transformer(tmp_path / "saved.safetensors", {}).config == CONFIG
    assert read_transformer(tensors, {}).config == CONFIG
    assert METADATA_KEY not in read_checkpoint(tmp_path / "saved.safetensors").state_dict


def test_a_header_goes_first(make_weights, tmp_path):
    """Protects `pixart convert --set`, which writes headers."""
    other = CONFIG.replace(num_heads=4)
    save_file(bundle(make_weights, config_tensor(other.to_json())), tmp_path / "a.safetensors",
              {METADATA_KEY: CONFIG.to_json()})
    assert read_transformer(tmp_path / "a.safetensors", {}).config == CONFIG


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.tensor([255, 254], dtype=torch.uint8),
                                    torch.tensor([123], dtype=torch.uint8)])
def test_a_tensor_that_is_no_config_is_refused(make_weights, tmp_path, tensor):
    save_file(bundle(make_weights, tensor), tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*pixart_config"):
        read_transformer(tmp_path / "bad.safetensors", {})
