"""Encoders of the starter, and one cache that the tests read or copy."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def encoders():
    import torch
    from training_cache_files import STARTER

    from pixart_core.text import T5TextEncoder
    from pixart_core.vae import load_vae

    return (T5TextEncoder.from_path(STARTER.t5_file, dtype=torch.float32),
            load_vae(STARTER.vae, "alpha"))


@pytest.fixture(scope="session")
def made(tmp_path_factory, encoders):
    """Nine pictures of three shapes and their cache; tests that change it take a copy."""
    from training_cache_files import PLAIN, fill

    from pixart_core.training.data import build_cache

    root = tmp_path_factory.mktemp("made")
    fill(root / "images")
    build_cache(root / "images", root / "cache", PLAIN, *encoders)
    return root


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"
