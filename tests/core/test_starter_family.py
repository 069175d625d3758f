"""The starter family beyond its base and student: the student in 4 bits, the Sigma model."""

import torch
from model_inputs import sizes

import pixart_core as pc
from pixart_core.starter import find_starter
from pixart_core.training.evaluate import DrawSettings, evaluate, held_out_prompts
from pixart_core.training.scenes import SceneSettings, render
from pixart_core.vae import load_vae

STARTER = find_starter()
SIZE = STARTER.image_size
SCENES = SceneSettings(SIZE, spread=0.0, grid=True)  # as those of its training
PROMPT = "a large red circle on a blue background"


def test_the_4_bit_student_is_the_student():
    """Protects the pair: one config, fewer bytes, 4-bit layers, nearly one prediction."""
    student, packed = (pc.load_transformer(path, dtype=torch.float32)
                       for path in (STARTER.lcm, STARTER.lcm_svdquant))
    assert packed.config == student.config
    assert STARTER.lcm_svdquant.stat().st_size < 0.6 * STARTER.lcm.stat().st_size
    assert {m.packing for m in packed.modules() if getattr(m, "packing", None)} == {"svdquant_w4a4"}
    encoder = pc.text.T5TextEncoder.from_path(STARTER.t5_file, dtype=torch.float32)
    caption, mask = encoder([PROMPT], max_tokens=student.config.max_tokens)
    x = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (model(x, torch.tensor([500.0]), caption[:, : int(mask.sum())],
                               **sizes(x))[:, :4] for model in (student, packed))
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert 1e-3 < error < 0.15, error


def test_the_4_bit_student_draws_what_was_asked():
    """Trained quality: what 4 bits may cost a few-step picture, on 6 held-out prompts."""
    pipeline = pc.Pipeline.from_files(STARTER.lcm_svdquant, STARTER.t5_file, STARTER.vae,
                                      device="cpu")
    prompts = held_out_prompts(6, 23, SCENES)
    settings = DrawSettings(steps=STARTER.lcm_steps, guidance=1.0, sampler="lcm", seed=1)
    shares = evaluate(pipeline, prompts, settings).rows["all"]
    assert shares["background"].mean >= 5 / 6 and shares["color"].mean >= 4 / 6, shares


def test_the_sigma_model_draws_what_was_asked():
    """Trained quality on the VAE and T5 of the alpha models, whose latents are scaled otherwise."""
    pipeline = pc.Pipeline.from_files(STARTER.sigma, STARTER.t5_file, STARTER.vae, device="cpu")
    config = pipeline.config
    assert config.variant == "sigma" and not config.micro_conditioning
    assert config.kv_compression.factor == 2
    settings = DrawSettings(steps=STARTER.steps, guidance=STARTER.guidance, seed=1)
    shares = evaluate(pipeline, held_out_prompts(6, 23, SCENES), settings).rows["all"]
    assert shares["background"].mean >= 5 / 6 and shares["color"].mean >= 5 / 6, shares
    assert shares["place"].mean >= 5 / 6, shares


def test_one_vae_serves_both_variants():
    """Protects Sigma's colours: its latents are the alpha ones times 0.13025 / 0.18215, and decode
    to the same picture."""
    alpha, sigma = (load_vae(STARTER.vae, variant) for variant in ("alpha", "sigma"))
    [prompt] = held_out_prompts(1, 23, SCENES)
    image = render([prompt.scene])
    latents = alpha.encode(image)
    torch.testing.assert_close(sigma.encode(image), latents * 0.13025 / 0.18215)
    decoded = sigma.decode(latents * 0.13025 / 0.18215)
    assert (decoded - alpha.decode(latents)).abs().max() < 1e-4
    assert (decoded - image).abs().mean() < 0.05
