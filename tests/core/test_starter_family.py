"""The starter family beyond its base and student: the student in 4 bits."""

import torch

import pixart_core as pc
from pixart_core.starter import find_starter
from pixart_core.training.evaluate import DrawSettings, evaluate, held_out_prompts
from pixart_core.training.scenes import SceneSettings

STARTER = find_starter()
SIZE = STARTER.image_size
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
        wanted, found = (model(x, torch.tensor([500.0]), caption[:, : int(mask.sum())])[:, :4]
                         for model in (student, packed))
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert 1e-3 < error < 0.15, error


def test_the_4_bit_student_draws_what_was_asked():
    """Trained quality: what 4 bits may cost a few-step picture, on 6 held-out prompts."""
    pipeline = pc.Pipeline.from_files(STARTER.lcm_svdquant, STARTER.t5_file, STARTER.vae,
                                      device="cpu")
    prompts = held_out_prompts(6, 23, SceneSettings(SIZE))
    settings = DrawSettings(steps=STARTER.lcm_steps, guidance=1.0, sampler="lcm", seed=1)
    shares = evaluate(pipeline, prompts, settings).rows["all"]
    assert shares["background"].mean >= 5 / 6 and shares["color"].mean >= 4 / 6, shares
