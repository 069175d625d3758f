"""Finding the starter models in a clone and in an installed package."""

from pathlib import Path

import pytest

import pixart_core as pc
from pixart_core import starter

FILES = [starter.TRANSFORMER, starter.LCM, starter.LCM_SVDQUANT, starter.SIGMA, starter.T5_FILE,
         starter.VAE, starter.CONTROLNET, starter.HED]


def test_a_clone_finds_its_family():
    """Protects the first run after a clone: every file is there, the T5 folder is whole."""
    found = starter.find_starter()
    assert found is not None
    assert found.transformer.parents[1] == Path(__file__).parents[2] / "starter"
    for path in (found.transformer, found.lcm, found.lcm_svdquant, found.sigma, found.t5_file,
                 found.vae, found.controlnet, found.hed):
        assert path.stat().st_size > 100_000
    assert (found.t5 / "spiece.model").is_file() and (found.t5 / "config.json").is_file()
    assert (found.image_size, found.guidance, found.lcm_steps) == (128, starter.GUIDANCE, 4)
    for path in (found.transformer, found.lcm, found.lcm_svdquant, found.sigma):
        config = pc.open_transformer(path)[1]
        assert (config.image_size, config.max_tokens) == (found.image_size, 40)
        assert config.variant == ("sigma" if path == found.sigma else "alpha")


@pytest.mark.parametrize("name", [*FILES, starter.T5])
def test_a_family_with_a_missing_file_is_none(tmp_path, monkeypatch, name):
    """Protects against a half-found family that fails later with a file error."""
    for each in FILES:
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).touch()
    (tmp_path / starter.T5).mkdir()
    monkeypatch.setattr(starter, "_FOLDERS", (tmp_path / "nowhere", tmp_path))
    assert starter.find_starter().vae == tmp_path / starter.VAE
    target = tmp_path / name
    target.rmdir() if target.is_dir() else target.unlink()
    assert starter.find_starter() is None


def test_the_wheel_carries_it_where_it_is_looked_for():
    """Protects the installed package: the build's target folder is the second place searched."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'starter = "pixart_core/{starter._FOLDERS[1].name}"' in text
