"""VAE files of every layout, and the scale between their latents and the model's."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

from pixart_core.checkpoint.read import CheckpointError  # noqa: E402
from pixart_core.vae import load_vae  # noqa: E402
from pixart_core.vae_layout import kl_state_dict  # noqa: E402

STARTER = Path(__file__).parents[2] / "starter"


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def kl():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    ).eval()


def _to_original(state_dict):
    """diffusers' names -> the original layout, written apart from the code under test."""
    result = {}
    for name, tensor in state_dict.items():
        for new, old in (
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
            ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
            ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
            ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
            ("resnets", "block"), ("down_blocks", "down"),
        ):
            name = name.replace(new, old)
        parts = name.split(".")
        if parts[1] == "up_blocks":
            parts[1:3] = ["up", str(3 - int(parts[2]))]
        name = ".".join(parts)
        if ".attn_1." in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        result[name] = tensor.clone()
    return result


def _same(vae, kl, image, scale):
    with torch.no_grad():
        wanted = kl.encode(image * 2 - 1).latent_dist.mean * scale
        latents = vae.encode(image)
        assert torch.allclose(latents, wanted, atol=1e-5)
        decoded = (kl.decode(wanted / scale).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(vae.decode(latents), decoded, atol=1e-5)


@pytest.mark.parametrize(("variant", "scale"), [("alpha", 0.18215), ("sigma", 0.13025)])
def test_diffusers_folder_and_latent_scale(kl, image, tmp_path, variant, scale):
    """Protects the one number between VAE and model: encode and decode apply it both ways."""
    kl.save_pretrained(tmp_path / "pipe" / "vae")
    _same(load_vae(tmp_path / "pipe" / "vae", variant), kl, image, scale)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    _same(load_vae(tmp_path / "pipe", variant), kl, image, scale)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_original_single_files(kl, image, tmp_path, prefix):
    """Protects the single files people have: original names, prefixed or whole checkpoints."""
    tensors = {prefix + name: t for name, t in _to_original(kl.state_dict()).items()}
    if prefix == "first_stage_model.":
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(4, 4)
    elif not prefix:
        tensors["loss.logvar"] = torch.zeros(())
    save_file(tensors, str(tmp_path / "vae.safetensors"))
    _same(load_vae(tmp_path / "vae.safetensors", "alpha"), kl, image, 0.18215)


def test_original_names_of_the_released_architecture():
    """Protects the key map at full size: 4 widths, 2 layers, every key of SD's VAE is reached."""
    with torch.device("meta"):
        full = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).state_dict()
    original = {name: torch.empty(t.shape, device="meta") for name, t in
                _to_original(full).items()}
    assert "decoder.up.3.block.2.conv1.weight" in original
    back = kl_state_dict(original)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in full.items()}


def test_single_file_with_old_attention_names(kl, image, tmp_path):
    """Protects sd-vae-ft-ema as it is published, with query, key, value and proj_attn."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in kl.state_dict().items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = tensor.clone()
    save_file(tensors, str(tmp_path / "old.safetensors"))
    _same(load_vae(tmp_path / "old.safetensors", "alpha"), kl, image, 0.18215)


def test_starter_vae_restores_pictures():
    """Protects the starter's VAE: a flat colour survives, latents have about unit deviation."""
    vae = load_vae(STARTER / "vae" / "vae_starter.safetensors", "alpha")
    picture = torch.tensor([40, 70, 215])[None, :, None, None].expand(1, 3, 64, 64) / 255
    picture = picture.clone()
    picture[:, :, 16:48, 16:48] = torch.tensor([215, 35, 40])[:, None, None] / 255
    latents = vae.encode(picture)
    assert latents.shape == (1, 4, 8, 8) and 0.3 < latents.std() < 3
    assert (vae.decode(latents) - picture).abs().mean() < 0.05


def test_a_tiny_vae_without_a_scale_works_on_model_latents(image, tmp_path):
    """Protects plain TAESD files: no scale for either variant; with one, it is the VAE's."""
    whole = load_file(STARTER / "vae" / "vae_starter.safetensors")
    plain = {n: t for n, t in whole.items() if not n.startswith("vae_")}
    save_file(plain, str(tmp_path / "plain.safetensors"))
    starter = load_vae(STARTER / "vae" / "vae_starter.safetensors", "alpha").encode(image)
    for variant in ("alpha", "sigma"):
        latents = load_vae(tmp_path / "plain.safetensors", variant).encode(image)
        assert torch.allclose(latents, starter, atol=1e-5)
    sigma = load_vae(STARTER / "vae" / "vae_starter.safetensors", "sigma").encode(image)
    assert torch.allclose(sigma, starter * 0.13025 / 0.18215, atol=1e-5)


def test_scale_and_shift_follow_the_host(image, tmp_path):
    """Protects the shift: the decoder sees (latents / 0.18215 - shift) * scale, encode undoes."""
    whole = load_file(STARTER / "vae" / "vae_starter.safetensors")
    whole["vae_scale"], whole["vae_shift"] = torch.tensor(0.5), torch.tensor(0.3)
    save_file(whole, str(tmp_path / "shifted.safetensors"))
    vae = load_vae(tmp_path / "shifted.safetensors", "alpha")
    starter = load_vae(STARTER / "vae" / "vae_starter.safetensors", "alpha")
    raw = starter.encode(image)  # the network's own latents
    assert torch.allclose(vae.encode(image), (raw / 0.5 + 0.3) * 0.18215, atol=1e-5)
    assert torch.allclose(vae.decode(vae.encode(image)), starter.decode(raw), atol=1e-5)


def test_halves_in_two_files(image, tmp_path):
    """Protects the taesd_decoder / taesd_encoder pair, and a decoder alone for text-to-image."""
    whole = load_file(STARTER / "vae" / "vae_starter.safetensors")
    for half in ("encoder", "decoder"):
        tensors = {n.removeprefix(f"taesd_{half}."): t for n, t in whole.items() if half in n}
        save_file(tensors, str(tmp_path / f"taesd_{half}.safetensors"))
    starter = load_vae(STARTER / "vae" / "vae_starter.safetensors", "alpha")
    for half in ("encoder", "decoder"):
        pair = load_vae(tmp_path / f"taesd_{half}.safetensors", "alpha")
        assert torch.allclose(pair.encode(image), starter.encode(image), atol=1e-5)
    (tmp_path / "taesd_encoder.safetensors").rename(tmp_path / "other_encoder.safetensors")
    alone = load_vae(tmp_path / "taesd_decoder.safetensors", "alpha")
    latents = starter.encode(image)
    assert torch.allclose(alone.decode(latents), starter.decode(latents), atol=1e-5)
    with pytest.raises(ValueError, match="decoder only"):
        alone.encode(image)
    with pytest.raises(CheckpointError, match="decoder"):
        load_vae(tmp_path / "other_encoder.safetensors", "alpha")


def test_diffusers_tiny_folder(image, tmp_path):
    """Protects AutoencoderTiny as diffusers saves it."""
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny().eval()
    tiny.save_pretrained(tmp_path / "taesd")
    with torch.no_grad():
        wanted = tiny.encode(image * 2 - 1).latents
    assert torch.allclose(load_vae(tmp_path / "taesd", "sigma").encode(image), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["diffusion_models/pixart_starter.safetensors",
                                  "text_encoders/t5_starter.safetensors"])
def test_other_models_are_named(name):
    """Protects users from a wall of key errors: the message says what the file is."""
    what = f"{Path(name).name}.*(PixArt transformer|T5 text encoder)"
    with pytest.raises(CheckpointError, match=what):
        load_vae(STARTER / name, "alpha")


def test_wrong_vaes_are_refused(kl, tmp_path):
    """Protects against 16-channel VAEs, LoRA files, half files and NaN."""
    good = kl.state_dict()
    wide = dict(good)
    wide["decoder.conv_in.weight"] = torch.zeros(64, 16, 3, 3)
    lacking = {n: t for n, t in good.items() if "decoder.up_blocks.1" not in n}
    broken = {n: t.clone() for n, t in good.items()}
    broken["decoder.conv_in.bias"][0] = float("nan")
    headless = {n: t for n, t in good.items() if not n.startswith("encoder.")}
    lora = {"lora_unet_x.lora_down.weight": torch.zeros(2, 4)}
    for tensors, message in ((wide, "16 latent channels"), (lacking, "lacks weights"),
                             (broken, "NaN"), (headless, "without its encoder"), (lora, "LoRA")):
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(tmp_path / "x.safetensors"))
        with pytest.raises(CheckpointError, match=message):
            load_vae(tmp_path / "x.safetensors", "alpha")
    tiny = {n: t for n, t in load_file(STARTER / "vae" / "vae_starter.safetensors").items()}
    tiny["taesd_decoder.1.weight"] = torch.zeros(64, 16, 3, 3)
    save_file(tiny, str(tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match="16 latent channels"):
        load_vae(tmp_path / "x.safetensors", "alpha")


def test_the_other_familys_vae_is_warned_about(kl, tmp_path, caplog):
    """Protects against washed-out colours: SD's VAE on a Sigma model is said once."""
    kl.save_pretrained(tmp_path / "vae")
    with caplog.at_level(logging.WARNING, "pixart_core"):
        load_vae(tmp_path / "vae", "alpha")
        assert not caplog.records
        load_vae(tmp_path / "vae", "sigma")
    assert "SDXL" in caplog.text


def test_tiling_is_close_to_the_whole(kl, tmp_path):
    """Protects tiled decoding: several tiles, the same picture but for the seams."""
    vae = load_vae(STARTER / "vae" / "vae_starter.safetensors", "alpha")
    torch.manual_seed(1)
    latents = torch.nn.functional.interpolate(torch.randn(1, 4, 6, 6), size=(96, 80),
                                              mode="bilinear")
    whole = vae.decode(latents)
    vae.enable_tiling()
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 768, 640)
    assert (tiled - whole).abs().max() > 0 and (tiled - whole).abs().mean() < 0.02


def test_sizes_that_do_not_divide_are_refused():
    """Protects encode from latents of another size than the picture's."""
    vae = load_vae(STARTER / "vae" / "vae_starter.safetensors", "alpha")
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="beta"):
        load_vae(STARTER / "vae" / "vae_starter.safetensors", "beta")
