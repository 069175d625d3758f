"""What a user may get wrong: said in one line, before anything is loaded where that can be."""

import errno
from pathlib import Path

import pytest
import torch
from training_samples import start, write_model

from pixart_core.checkpoint.header import CheckpointError
from pixart_core.training.checkpoint import checkpoints_in
from pixart_core.training.curves import Curves
from pixart_core.training.initialize import transformer_to_train
from pixart_core.training.loop import train
from pixart_core.training.recipes import make_recipe, recipe_settings
from pixart_core.training.settings import parse_pairs, read_settings_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("training") / "model.safetensors")


def settings(name, folder, *pairs, **changes):
    """Settings as the command reads them; every path that is not changed is there."""
    own = {"out": folder / "run", "data": folder, "model": folder}
    return recipe_settings(name, own, changes, parse_pairs(pairs))


def test_no_precision_may_be_written_as_it_is_named(tmp_path):
    """Protects `precision=no`: YAML reads the bare word as false."""
    assert settings("base", tmp_path, "precision=no").precision == "no"
    file = tmp_path / "own.yaml"
    file.write_text("precision: no\n")
    assert recipe_settings("base", {"out": "x", "data": "y", "model": "z"},
                           read_settings_file(file)).precision == "no"
    with pytest.raises(ValueError, match="schedule is False; use one of constant, cosine"):
        settings("base", tmp_path, "schedule=no")


def test_a_home_folder_may_be_written_as_in_a_shell(tmp_path, monkeypatch):
    """Protects `data=~/cache`, which shells hand on as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert settings("base", tmp_path, "data=~/cache").data == tmp_path / "cache"


@pytest.mark.parametrize("name", ["data", "model", "vae", "class_data"])
def test_a_path_that_is_not_there_is_named_before_anything_is_loaded(name, tmp_path):
    """Protects hours: a wrong `vae` would be noticed at the first sample grid."""
    with pytest.raises(ValueError, match=f"^{name} is nowhere/x, which does not exist$"):
        make_recipe("lora", settings("lora", tmp_path, **{name: "nowhere/x"}))


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/run"):
        with pytest.raises(ValueError, match=f"out is .*{out}, but .*file is a file; name a fold"):
            make_recipe("base", settings("base", tmp_path, out=tmp_path / out))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_somebody_else_is_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written to"):
        make_recipe("base", settings("base", tmp_path))


@pytest.mark.parametrize(("changes", "message"), [
    ({"alpha": 0.0}, "alpha is 0.0; use a number above 0"),
    ({"rank": 0}, "rank is 0"),
    ({"sample_count": 0}, "sample_count is 0; it must be 1 or more"),
    ({"sample_steps": 0}, "sample_steps is 0; it must be 1 or more"),
])
def test_values_with_which_nothing_would_be_learned_or_shown(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings("lora", tmp_path, **changes)


@pytest.mark.parametrize(("compression", "message"), [
    ({"sampling": "conv", "factr": 2}, "factor and layers were expected"),
    ({"sampling": "conv", "factor": "two", "layers": [1]}, "factor and layers were expected"),
    ({"sampling": "conv", "factor": 2, "layers": [9]}, "past the last block"),
])
def test_a_wrong_compression_is_named(compression, message, model):
    with pytest.raises(ValueError, match=message):
        transformer_to_train(model, compression)


@pytest.mark.parametrize(("source", "message"), [
    ({"hidden_size": "big"}, "hidden_size': 'big'} is no config"),
    ({"hiden_size": 8}, "unknown config field hiden_size"), ({"preset": "x"}, "preset is 'x'")])
def test_a_wrong_model_from_scratch_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        transformer_to_train(source)


def test_another_rank_in_the_same_folder_is_named(model, tmp_path):
    """Protects the message: the settings are compared before weights that cannot fit are read."""
    train(start("lora", tmp_path, model, steps=1))
    with pytest.raises(ValueError, match="other settings: rank is 2 there and 3 here"):
        train(start("lora", tmp_path, model, steps=2, rank=3))


def test_weights_that_gradients_spoilt_are_not_kept(model, tmp_path):
    """Protects the last good checkpoint: the loss of the step itself may still be a number, and
    a step may be kept that no curve tells of."""
    recipe = start("base", tmp_path, model, steps=4, save_every=2, log_every=100)

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("nan")

    healthy = recipe.loss
    seen = []

    def loss(trained, batch, draws):
        losses = healthy(trained, batch, draws)
        seen.append(1)
        return type(losses)(Spoilt.apply(losses.total) if len(seen) == 4 else losses.total,
                            losses.parts)

    recipe.loss = loss
    with pytest.raises(ValueError, match=r"gradient norm is nan at step 4.*step-00000002"):
        train(recipe)
    assert [c.name for c in checkpoints_in(tmp_path)] == ["step-00000002"]


def test_curves_that_cannot_be_written_say_how_to_go_on(tmp_path, monkeypatch):
    """Protects the message of a disk that is full between two checkpoints."""
    curves = Curves(tmp_path, 0)

    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    curves._file.close()
    curves._file = Full()
    with pytest.raises(CheckpointError, match=r"step 3: .*No space left.*go on from the last"):
        curves.write(3, {"loss": 1.0})


def test_a_file_that_is_no_vae_is_refused(model, tmp_path):
    """Protects the VAE recipe's message, which was a list of every tensor."""
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    with pytest.raises(ValueError, match="holds no whole VAE of TAESD's"):
        make_recipe("vae", recipe_settings("vae", {
            "out": tmp_path / "run", "data": tmp_path / "pictures", "crop": 16, "vae": model}))
