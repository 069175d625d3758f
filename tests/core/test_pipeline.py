"""Prompt to picture on the starter models, and the samplers against loops of their own."""

import numpy
import pytest
import torch
from model_inputs import sizes

pytest.importorskip("diffusers")

from pixart_core import sampling
from pixart_core.config import PRESETS
from pixart_core.pipeline import Pipeline
from pixart_core.settings import Settings
from pixart_core.starter import find_starter
from pixart_core.training.evaluate import DrawSettings, detect, evaluate, held_out_prompts
from pixart_core.training.scenes import Scene, SceneObject, SceneSettings, render

PROMPT = "a large red circle in the centre on a blue background"
STARTER = find_starter()
SIDE = 64  # pixels, where what is drawn does not matter: half of the training size
SMALL = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_files(transformer=STARTER.transformer, t5=STARTER.t5, vae=STARTER.vae,
                               device="cpu")


@pytest.fixture(scope="module")
def student():
    return Pipeline.from_files(transformer=STARTER.lcm, t5=STARTER.t5_file, vae=STARTER.vae,
                               device="cpu")


def _as_tensor(image):
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


def _k_diffusion_2m(predict, noise, timesteps):
    """DPM-Solver++ 2M in variance-exploding form, as k-diffusion writes it."""
    sigmas = [sampling.sigmas()[t].item() for t in timesteps] + [0.0]
    x = noise.double() * (1 + sigmas[0] ** 2) ** 0.5
    old = None
    for i, t in enumerate(timesteps):
        s, s_next = sigmas[i], sigmas[i + 1]
        denoised = x - s * predict((x / (1 + s * s) ** 0.5).float(), t).double()
        if s_next == 0:
            return denoised.float()
        h = numpy.log(s) - numpy.log(s_next)
        blended = denoised
        if old is not None:
            ratio = (numpy.log(sigmas[i - 1]) - numpy.log(s)) / h
            blended = (1 + 1 / (2 * ratio)) * denoised - old / (2 * ratio)
        x = s_next / s * x - numpy.expm1(-h) * blended
        old = denoised


def test_dpm_is_the_hosts_2m(pipe):
    """Protects seeds shared with ComfyUI: the same latents as its own form of the solver, 1/255."""
    settings = Settings(PROMPT, guidance=3.0, seed=11, **SMALL).resolve(pipe.config)
    timesteps = settings.timesteps()
    with torch.inference_mode():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
        predict = pipe._predictor(settings, [PROMPT])
        wanted = pipe.vae.decode(_k_diffusion_2m(predict, noise, timesteps))
        ours = pipe.vae.decode(sampling.sample_dpm(predict, noise, timesteps))
    assert (ours - wanted).abs().max() < 1 / 255
    picture = _as_tensor(pipe.generate(PROMPT, guidance=3.0, seed=11, **SMALL))
    assert (picture - wanted[0]).abs().max() < 1.01 / 255


def test_guided_prediction_is_two_single_ones(pipe):
    """Protects the guided batch: padding, order and formula, against two separate calls."""
    settings = Settings(PROMPT, "a small star", guidance=3.5, **SMALL).resolve(pipe.config)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        guided = pipe._predictor(settings, [PROMPT])(x, 600)
        eps = []
        for text in ("a small star", PROMPT):
            states, mask = pipe.encoder([text], max_tokens=40)
            length = int(mask.sum())
            out = pipe.transformer(x, torch.tensor([600]), states[:, :length], **sizes(x))
            eps.append(out[:, :4])
    wanted = eps[0] + 3.5 * (eps[1] - eps[0])
    assert torch.allclose(guided, wanted, atol=1e-4)


def test_without_guidance_the_model_runs_once(pipe, monkeypatch, caplog):
    """Protects LCM's speed: no second half of the batch; an idle negative prompt is said."""
    batches = []
    forward = type(pipe.transformer).forward

    def counting(self, x, *args, **kwargs):
        batches.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", counting)
    pipe.generate(PROMPT, steps=2, guidance=1.0, negative_prompt="ugly")
    assert batches == [1, 1] and "no effect" in caplog.text
    batches.clear()
    pipe.generate(PROMPT, steps=2, guidance=2.0)
    assert batches == [2, 2]


def test_a_seed_gives_the_same_picture_and_another_another(pipe):
    """Protects reproducibility: seeds, and no state left behind by a run between."""
    first = pipe.generate(PROMPT, steps=4, seed=5)
    other = pipe.generate(PROMPT, steps=4, seed=6)
    torch.manual_seed(99)
    assert pipe.generate(PROMPT, steps=4, seed=5).tobytes() == first.tobytes()
    assert other.tobytes() != first.tobytes()


def test_a_list_of_prompts_gives_a_list(pipe):
    """Protects batches: one noise draw for all, every prompt with its own mask."""
    prompts = [PROMPT, "a small green star at the left on a white background"]
    pictures = pipe.generate(prompts, steps=8, seed=3)
    assert [p.size for p in pictures] == [(128, 128)] * 2
    alone = pipe.generate(PROMPT, steps=8, seed=3)
    difference = (_as_tensor(pictures[0]) - _as_tensor(alone)).abs()
    assert difference.max() <= 2 / 255  # the first rows of one draw are the same noise
    assert abs(_as_tensor(pictures[1])[0].mean() - _as_tensor(pictures[0])[0].mean()) > 0.1


def test_the_starter_draws_what_was_asked(pipe, student):
    """Protects the whole chain end to end: 12 held-out prompts, read by the judge."""
    scenes = SceneSettings(STARTER.image_size, spread=0.0, grid=True)  # as in its training
    prompts = held_out_prompts(12, 21, scenes)
    for pipeline, guidance, floor in ((pipe, STARTER.guidance, 0.9), (student, None, 0.7)):
        shares = evaluate(pipeline, prompts, DrawSettings(guidance=guidance, seed=1)).rows["all"]
        for name in ("background", "color", "size", "place"):
            assert shares[name].mean >= floor, (name, shares)


def test_other_sizes_and_callback(pipe):
    """Protects sizes that are not square, also an odd number of latents, and the progress calls."""
    seen = []
    picture = pipe.generate(PROMPT, height=72, width=48, steps=3,
                            callback=lambda *values: seen.append(values))
    assert picture.size == (48, 72)
    assert [(step, total) for step, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(latents.shape == (1, 4, 9, 6) for *_, latents in seen)
    seen.clear()
    pipe.generate(PROMPT, steps=2, sampler="lcm", guidance=1.0,
                  callback=lambda *values: seen.append(values))
    assert [step for step, *_ in seen] == [1, 2]


def test_image_to_image_keeps_the_picture(pipe):
    """Protects strength: little of it keeps the picture, all of it forgets it."""
    square = SceneObject("green", "square", "large", 32.0, 64.0, 30.0)
    scene = Scene(128, 128, "one", "white", (square,), place="left")
    from PIL import Image

    pixels = (render([scene])[0] * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    prompt = "a large green square on the left on a white background"
    for sampler in ("dpm", "lcm"):
        kept = pipe.generate(prompt, image=image, strength=0.3, steps=4, sampler=sampler,
                             guidance=1.0)
        assert (_as_tensor(kept) - _as_tensor(image)).abs().mean() < 0.1
    away = pipe.generate(PROMPT, image=image, strength=1.0, steps=20, guidance=STARTER.guidance)
    seen = detect(_as_tensor(away))
    assert seen.background == "blue" and seen.objects[0].color == "red"
    large = pipe.generate(prompt, image=image.resize((200, 100)), strength=0.3, steps=2)
    assert large.size == (128, 128)


def test_caption_cleaning_can_be_left_out(pipe, monkeypatch):
    """Protects the switch: the encoder gets the cleaned prompt, or the prompt as it is."""
    seen = []
    encode = type(pipe.encoder).__call__

    def recording(self, prompts, max_tokens):
        seen.extend(prompts)
        return encode(self, prompts, max_tokens)

    monkeypatch.setattr(type(pipe.encoder), "__call__", recording)
    pipe.generate("A Large RED circle", steps=1, guidance=1.0)
    pipe.generate("A Large RED circle", steps=1, guidance=1.0, clean_caption=False)
    assert seen[0] == "a large red circle" and seen[1] == "A Large RED circle"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps"), ({"steps": 1001}, "steps"), ({"steps": 2.5}, "steps"),
     ({"steps": 51, "sampler": "lcm"}, "LCM steps"), ({"strength": 0.0}, "strength"),
     ({"strength": 1.2}, "strength"), ({"height": 0}, "height"), ({"width": 7}, "width"),
     ({"width": 20000}, "width is 20000"), ({"height": -64}, "height"), ({"seed": -1}, "seed"),
     ({"seed": 2**64}, "seed"), ({"guidance": -1.0}, "guidance"),
     ({"guidance": float("nan")}, "guidance"), ({"sampler": "euler"}, "sampler"),
     ({"lcm_grid": "karras"}, "lcm_grid"), ({"max_tokens": 0}, "max_tokens"),
     ({"negative_prompt": None}, "negative_prompt"),
     ({"steps": 4, "sampler": "lcm", "strength": 0.02}, "smallest strength")],
)
def test_settings_that_cannot_be_followed(settings, message):
    """Protects a long load from a request that could never run: no model is touched."""
    with pytest.raises(ValueError, match=message):
        Settings(PROMPT, **settings)


def test_requests_the_pipeline_refuses(pipe):
    """Protects options from being ignored: strength without a picture, no prompts at all."""
    with pytest.raises(ValueError, match="needs an image"):
        pipe.generate(PROMPT, strength=0.5)
    with pytest.raises(ValueError, match="DMD draws from noise alone"):
        pipe.generate(PROMPT, sampler="dmd", image=object())
    with pytest.raises(ValueError, match="no prompts"):
        pipe.generate([])
    with pytest.raises(ValueError, match="PIL image"):
        pipe.generate(PROMPT, image=torch.zeros(3, 64, 64), strength=0.5)


def test_defaults_follow_the_model():
    """Protects LCM models from guidance and 20 steps, and size and tokens from the wrong model."""
    lcm = Settings("x").resolve(PRESETS["delta-1024-lcm"])
    assert (lcm.sampler, lcm.steps, lcm.guidance, lcm.width) == ("lcm", 4, 1.0, 1024)
    sigma = Settings("x").resolve(PRESETS["sigma-512"])
    assert (sigma.sampler, sigma.steps, sigma.guidance) == ("dpm", 20, 4.5)
    assert (sigma.height, sigma.width, sigma.max_tokens) == (512, 512, 300)
    named = Settings("x", steps=6, guidance=2.0, sampler="dpm", height=64)
    assert named.resolve(PRESETS["delta-1024-lcm"]).guidance == 2.0
    dmd = Settings("x").resolve(PRESETS["alpha-512-dmd"])
    assert (dmd.sampler, dmd.timesteps(), dmd.guidance, dmd.width) == ("dmd", [400], 1.0, 512)
    with pytest.raises(ValueError, match="DMD takes 1 step"):
        Settings("x", steps=4).resolve(PRESETS["alpha-512-dmd"])
    stochastic = Settings("x", sampler="sa-solver").resolve(PRESETS["alpha-1024"])
    assert (stochastic.steps, stochastic.guidance) == (25, 3.0)


def test_settings_survive_a_round_trip():
    """Protects what a picture keeps."""
    settings = Settings("x", "y", 64, 128, 3, 2.0, 7, "lcm", "official", 0.5, False, 12)
    assert Settings.from_dict(settings.as_dict()) == settings
    with pytest.raises(ValueError, match="colour"):
        Settings.from_dict({"prompt": "x", "colour": 1})


def test_files_that_do_not_belong_together(tmp_path):
    """Protects from_files: what is missing or swapped is named before anything runs."""
    with pytest.raises(ValueError, match="no t5"):
        Pipeline.from_files(transformer=STARTER.transformer, vae=STARTER.vae)
    with pytest.raises(ValueError, match="vae_starter"):
        Pipeline.from_files(transformer=STARTER.vae, t5=STARTER.t5, vae=STARTER.vae)
    with pytest.raises(ValueError, match="PixArt transformer"):
        Pipeline.from_files(transformer=STARTER.transformer, t5=STARTER.t5,
                            vae=STARTER.transformer)


def test_size_and_ratio_reach_a_model_that_wants_them(pipe):
    """Protects micro-conditioning: height and width in pixels, ratio h / w, for the whole batch."""
    calls = []

    class Recorder(torch.nn.Module):
        config = pipe.config
        x_embedder = pipe.transformer.x_embedder

        def prepare_caption(self, caption, mask):
            return caption

        def forward(self, x, timestep, caption, image_size, aspect_ratio, control):
            calls.append((image_size, aspect_ratio, timestep))
            return torch.cat([x, x], dim=1)

    recorder = Pipeline(Recorder(), pipe.encoder, pipe.vae)
    recorder.generate([PROMPT, PROMPT], height=96, width=64, steps=1, guidance=4.0)
    size, ratio, timestep = calls[0]
    assert size.tolist() == [[96.0, 64.0]] * 4 and ratio.tolist() == [[1.5]] * 4
    assert timestep.tolist() == [999] * 4
