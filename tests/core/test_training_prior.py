"""DreamBooth's prior preservation: the loss of the class, its noise, resuming."""

import dataclasses

import pytest
import torch
import training_samples
from training_samples import MemorySamples, class_pictures, files_equal, losses, write_model

from pixart_core.sampling.schedule import add_noise
from pixart_core.training.curves import read_curves
from pixart_core.training.draws import Draws, mix_seed
from pixart_core.training.loop import train
from pixart_core.training.prior import PriorSamples
from pixart_core.training.recipes import recipe_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("training") / "model.safetensors")


def start(out, model, **changes):
    return training_samples.start("lora", out, model, **{"class_data": out / "class"} | changes)


def by_hand(recipe, batch, draws):
    """Mean squared error of the noise prediction, from the draws in their order."""
    t = draws.integers(1000)
    noise = draws.noise(batch.latents)
    out = recipe.trained(add_noise(batch.latents, noise, t), t, caption=batch.caption,
                         caption_mask=batch.mask)
    return (out[:, :4] - noise).square().mean()


@pytest.mark.parametrize("weight", [None, 0.25])
def test_the_loss_is_the_subjects_plus_the_weighted_classs(weight, model, tmp_path):
    """Protects equation 2 of DreamBooth: both halves with their own noise, in loss and gradient."""
    recipe = start(tmp_path, model, prior_loss_weight=weight, seed=4)
    batch = recipe.samples.batch(3, 2)
    g = torch.Generator().manual_seed(0)
    for parameter in recipe.adapters._adapted.values():  # B starts at zero and would hide A
        parameter.data.normal_(std=0.3, generator=g)
    parameters = list(recipe.adapters._adapted.values())

    mine = recipe.loss(recipe.trained, batch, Draws(4, batch.numbers))
    subject = by_hand(recipe, batch.subject, Draws(4, (6, 7)))
    prior = by_hand(recipe, batch.prior, Draws(mix_seed(4, 1), (6, 7)))
    assert torch.equal(mine.parts["noise"], subject) and torch.equal(mine.parts["prior"], prior)
    factor = 1.0 if weight is None else weight
    assert mine.total.item() == pytest.approx(subject.item() + factor * prior.item(), rel=1e-6)

    gradients = [torch.autograd.grad(x, parameters, retain_graph=True)
                 for x in (mine.total, subject, prior)]
    for total, of_subject, of_prior in zip(*gradients, strict=True):
        assert of_prior.abs().max() > 0
        assert torch.allclose(total, of_subject + factor * of_prior, rtol=1e-4, atol=1e-7)


def test_a_run_with_class_pictures_goes_on_exactly(model, tmp_path):
    """Protects exact resuming, also with accumulation: losses and files bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"gradient_accumulation": 2, "class_data": tmp_path / "class"}
    train(start(whole, model, steps=4, **settings))
    for steps in (2, 4):
        train(start(parts, model, steps=steps, **settings))
    assert losses(parts) == losses(whole) and files_equal(parts, whole)
    assert all(point["prior"] > 0 for point in read_curves(whole))


def test_the_class_changes_what_is_learned(model, tmp_path):
    """Protects against class pictures that are read and have no effect."""
    for weight in (0.5, 1.0):
        train(start(tmp_path / str(weight), model, steps=2, prior_loss_weight=weight))
    assert not files_equal(tmp_path / "0.5", tmp_path / "1.0")


def test_a_run_is_not_continued_with_another_class(model, tmp_path):
    """Protects resuming: class pictures and their weight are settings of the run."""
    train(start(tmp_path, model, steps=1))
    for changes in ({"class_data": tmp_path / "other"}, {"prior_loss_weight": 2.0}):
        with pytest.raises(ValueError, match=f"other settings: {next(iter(changes))} is"):
            train(start(tmp_path, model, steps=2, **changes))


def test_batches_move_to_a_device_as_a_pair():
    batch = class_pictures().batch(0, 2).to("meta")
    assert {batch.subject.latents.device.type, batch.prior.caption.device.type} == {"meta"}
    assert len(batch) == 2 and batch.numbers == (0, 1)


def test_both_halves_have_to_fit_the_model():
    """Protects the check of the class's cache, beside the subject's."""
    class Wrong(MemorySamples):
        def check_fit(self, config):
            raise ValueError("captions 8 wide")

    with pytest.raises(ValueError, match="8 wide"):
        PriorSamples(MemorySamples(), Wrong()).check_fit(None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"prior_loss_weight": 1.0}, "no class pictures to weigh; name their cache as class_data"),
    ({"class_data": "x", "prior_loss_weight": 0.0}, "prior_loss_weight is 0.0; use a number above"),
    ({"class_data": "x", "prior_loss_weight": -1}, "prior_loss_weight is -1.0; use a number above"),
    ({"class_data": "x", "prior_loss_weight": float("nan")}, "prior_loss_weight is nan"),
    ({"class_data": 3}, "class_data is 3"),
])
def test_a_prior_that_makes_no_sense_is_refused(changes, message, tmp_path):
    good = {"out": tmp_path, "data": tmp_path, "model": tmp_path}
    with pytest.raises(ValueError, match=message):
        recipe_settings("lora", good, changes)


def test_settings_from_before_fit_a_run_without_a_class(model, tmp_path):
    """Protects runs that began before class pictures: their settings name none."""
    recipe = start(tmp_path, model, samples=MemorySamples(), class_data=None, steps=1)
    assert dataclasses.asdict(recipe.settings)["prior_loss_weight"] is None
    train(recipe)
    state = next((tmp_path / "checkpoints").glob("*/state.json"))
    text = state.read_text()
    for name in ("class_data", "prior_loss_weight"):
        text = text.replace(f'  "{name}": null,\n', "")
    assert "class_data" not in text
    state.write_text(text)
    again = start(tmp_path, model, samples=MemorySamples(), class_data=None, steps=2)
    assert train(again).step == 2
