"""Small models, captions and the command itself, for the tests of `pixart quantize`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.text.embeddings import CaptionEntry, save_embeddings

FIELDS = {"variant": "alpha", "hidden_size": 64, "depth": 2, "num_heads": 2,
          "mlp_hidden_size": 128, "caption_channels": 16, "max_tokens": 8, "image_size": 32,
          "base_size": 2, "pe_interpolation": 1.0, "distilled": "lcm"}
FOUR_BITS = 6  # layers of a block


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`pixart` in an empty folder; the result has exit_code, stdout and stderr."""
    typer_testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    runner = typer_testing.CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


def words(done) -> str:
    """What a command said, without the frame of usage errors."""
    return " ".join((done.stdout + done.stderr).replace("│", " ").split())


def make_model(path, seed=0, **changes):
    """Write a transformer whose weights have outlier channels, as trained ones do; its path."""
    config = pc.PixArtConfig(**(FIELDS | changes))
    torch.manual_seed(seed)
    model = pc.PixArtTransformer(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if "table" in name else 0.08)
        if parameter.ndim == 2 and "blocks" in name and "table" not in name:
            parameter.data[:, ::17] *= 6
    model.y_embedder.y_embedding.normal_()
    return write(path, {name: t.half() for name, t in model.state_dict().items()}, config)


def write(path, tensors, config):
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path,
              metadata={METADATA_KEY: config.to_json()})
    return path


def make_control(path, model_path, depth=1, seed=1):
    """Write a ControlNet for a model, whose projections are not zero; its path."""
    net = pc.PixArtControlNet.from_base(pc.load_transformer(model_path, dtype=torch.float32), depth)
    torch.manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return write(path, {name: t.half() for name, t in net.state_dict().items()}, net.config)


def make_captions(path, count=3, width=16, seed=0):
    """Write encoded prompts of random states; the path."""
    generator = torch.Generator().manual_seed(seed)
    save_embeddings(path, [CaptionEntry(torch.randn(count, 4, width, generator=generator))], {})
    return path


def predict(model, control=None):
    """Noise predictions (2, 4, 4, 4) of a model that is a path or a module."""
    if not isinstance(model, torch.nn.Module):
        model = pc.load_transformer(model, dtype=torch.float32)
    g = torch.Generator().manual_seed(9)
    x, caption = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 5, 16, generator=g)
    latent = torch.randn(2, 4, 4, 4, generator=g)
    controls = [] if control is None else [pc.Control(control, latent)]
    with torch.no_grad():
        return model(x, torch.tensor([900.0, 250.0]), caption, control=controls)[:, :4]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
