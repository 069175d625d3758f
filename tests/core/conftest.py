"""Fixtures that several test files share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(Path(__file__).parent))  # test files import modules beside them

Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def golden_weights() -> Callable[[str], tuple[Weights, dict[str, Any]]]:
    """Weights of an official model (tiny) by the stem of its golden file, and what made them."""
    from safetensors import safe_open

    def load(stem: str) -> tuple[Weights, dict[str, Any]]:
        with safe_open(GOLDEN / f"{stem}.safetensors", framework="pt") as file:
            meta = json.loads(file.metadata()["meta"])
            weights = {name.removeprefix("weights."): file.get_tensor(name)
                       for name in file.keys() if name.startswith("weights.")}  # noqa: SIM118
        return weights, meta

    return load


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Weights]:
    """Random weights of any config under native names, float32: fields as in PixArtConfig."""
    from pixart_core.config import PixArtConfig
    from pixart_core.model.transformer import PixArtTransformer

    def make(null_caption: bool = True, seed: int = 0, **fields: Any) -> Weights:
        small = {"hidden_size": 48, "depth": 2, "num_heads": 4, "mlp_hidden_size": 96,
                 "caption_channels": 24, "max_tokens": 120}
        model = PixArtTransformer(PixArtConfig(**(small | fields)), device="meta",
                                  null_caption=null_caption)
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(tensor.shape, generator=generator)
                for name, tensor in model.state_dict().items()}

    return make
