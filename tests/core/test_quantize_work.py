"""The folder of an unfinished quantisation is gone in the end, as far as the system lets it."""

import sys
from pathlib import Path

import pytest
import torch
from quant_layers import quantized, weight_and_bias

from pixart_core.quantize.work import SolvedLayer, WorkFolder

NAMES = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")


@pytest.fixture
def work(tmp_path):
    folder = WorkFolder(tmp_path / "model.safetensors")
    folder.begin({"rank": 16})
    folder.save_inputs({"blocks.0.attn.qkv": torch.randn(64, 128)})
    weight, bias = weight_and_bias()
    for name in NAMES:
        folder.save_layer(name, SolvedLayer(quantized("svdquant", weight), bias, {"svdquant": 0.1}))
    return folder


def delete_unless(monkeypatch, locked):
    unlink = Path.unlink

    def careful(path, missing_ok=False):
        if locked(path):
            raise PermissionError(f"{path} is in use")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", careful)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_solved_layers_in_use_keep_no_file(work, monkeypatch):
    """Windows deletes nothing that is mapped; rows are gone by then, layers are still in use."""
    delete_unless(monkeypatch, lambda path: str(path) in Path("/proc/self/maps").read_text())
    layers = {name: work.layer(name) for name in NAMES}
    assert work.inputs()["blocks.0.attn.qkv"].shape == (64, 128)
    work.finish()
    assert not work.path.exists()
    assert layers[NAMES[0]].weight.is_finite()


def test_what_cannot_be_deleted_is_named_and_belongs_to_its_job(work, monkeypatch, caplog):
    """The layer that stays must not be taken for one of another job."""
    delete_unless(monkeypatch, lambda path: path.name.startswith("blocks.0.mlp.fc1"))
    work.finish()
    assert [file.name for file in work.path.glob("*.safetensors")] == [
        "blocks.0.mlp.fc1.safetensors"]
    assert "blocks.0.mlp.fc1.safetensors" in caplog.text and "delete the folder" in caplog.text
    with pytest.raises(ValueError, match="begun with rank 16"):
        work.begin({"rank": 32})
