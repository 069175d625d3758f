"""Every container a PixArt file comes in, and everything that training wraps around it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pixart_core.checkpoint.read import CheckpointError, read_checkpoint

ONE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2, dtype=torch.float16)}


def holds(checkpoint, tensors) -> bool:
    found = checkpoint.state_dict
    return found.keys() == tensors.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".SAFETENSORS"])
def test_safetensors_are_mapped_with_their_metadata(suffix, tmp_path) -> None:
    path = tmp_path / f"m{suffix}"
    save_file(ONE, path, metadata={"pixart_config": "{}"})
    found = read_checkpoint(str(path))
    assert holds(found, ONE) and found.metadata == {"pixart_config": "{}"} and found.mapped
    assert found.path == path and found.config == {}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_pickles_of_both_generations(suffix, as_zip, tmp_path) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save(ONE, path, _use_new_zipfile_serialization=as_zip)
    found = read_checkpoint(path)
    assert holds(found, ONE) and found.mapped == as_zip


@pytest.mark.parametrize("wrap", [
    lambda sd: {"state_dict": sd, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}},
                "scheduler": {"last_epoch": 3}, "epoch": 7, "step": 9},
    lambda sd: {"state_dict": sd, "state_dict_ema": {k: v * 0 for k, v in sd.items()}},
    lambda sd: {"state_dict_ema": sd, "epoch": 1},
    lambda sd: {"model": sd},
    lambda sd: {"model": {"state_dict": sd}},
    lambda sd: {"module." + k: v for k, v in sd.items()},
    lambda sd: {"state_dict": {"module._orig_mod." + k: v for k, v in sd.items()}},
    lambda sd: {k: torch.nn.Parameter(v) for k, v in sd.items()},
    lambda sd: sd | {"epoch": 3, 5: "five", "history": [1, 2]},
])
def test_wrappers_of_training(wrap, tmp_path) -> None:
    torch.save(wrap(ONE), tmp_path / "m.pth")
    assert holds(read_checkpoint(tmp_path / "m.pth"), ONE)


def test_ema_on_request(tmp_path) -> None:
    ema = {k: v * 0 for k, v in ONE.items()}
    torch.save({"state_dict": ONE, "state_dict_ema": ema}, tmp_path / "m.pth")
    assert holds(read_checkpoint(tmp_path / "m.pth"), ONE)
    assert holds(read_checkpoint(tmp_path / "m.pth", prefer_ema=True), ema)


def sharded(folder, stem="diffusion_pytorch_model", suffix=".safetensors"):
    names = [f"{stem}-{i:05}-of-00002{suffix}" for i in (1, 2)]
    for name, key in zip(names, ONE, strict=True):
        save = save_file if suffix == ".safetensors" else torch.save
        save({key: ONE[key]}, folder / name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 28},
                                 "weight_map": dict(zip(ONE, names, strict=True))}))
    return index, names


@pytest.mark.parametrize("stem, suffix", [("diffusion_pytorch_model", ".safetensors"),
                                          ("pytorch_model", ".bin"), ("model", ".safetensors")])
def test_sharded_folder_or_any_of_its_shards(stem, suffix, tmp_path) -> None:
    _, names = sharded(tmp_path, stem, suffix)
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        assert holds(read_checkpoint(path), ONE)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors",
                                  "diffusion_pytorch_model.fp16.safetensors",
                                  "pytorch_model.bin", "adapter_model.safetensors",
                                  "my-own-name.safetensors"])
def test_folder_with_one_file_and_config(name, tmp_path) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(ONE, tmp_path / name)
    (tmp_path / "config.json").write_text('{"sample_size": 64}')
    found = read_checkpoint(tmp_path)
    assert holds(found, ONE) and found.config == {"sample_size": 64}


def test_pipeline_folder(tmp_path) -> None:
    other = {"t5": torch.zeros(1)}
    for part, tensors in (("transformer", ONE), ("text_encoder", other)):
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(json.dumps({"part": part}))
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    found = read_checkpoint(tmp_path)
    assert holds(found, ONE) and found.config == {"part": "transformer"}
    assert found.pipeline_class == "PixArtSigmaPipeline"
    assert holds(read_checkpoint(tmp_path, "text_encoder"), other)
    assert holds(read_checkpoint(tmp_path / "text_encoder", "text_encoder"), other)
    with pytest.raises(CheckpointError, match="without a 'vae' folder"):
        read_checkpoint(tmp_path, "vae")
    for bad in ("..", "../x", "/etc", ""):
        with pytest.raises(CheckpointError, match="subfolder"):
            read_checkpoint(tmp_path, bad)


def test_config_beside_a_file(tmp_path) -> None:
    save_file(ONE, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"num_attention_heads": 2}')
    assert read_checkpoint(tmp_path / "m.safetensors").config == {"num_attention_heads": 2}
    for bad in ("[]", "{", "3", "\udcff"):
        (tmp_path / "config.json").write_bytes(bad.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_checkpoint(tmp_path / "m.safetensors")


def test_folder_that_cannot_be_meant(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="hold no weights"):
        read_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file(ONE, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several.*a\.safetensors, b\.safetensors"):
        read_checkpoint(tmp_path)


def test_missing_shard_is_named(tmp_path) -> None:
    _, names = sharded(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        read_checkpoint(tmp_path)


def test_shard_without_index(tmp_path) -> None:
    index, names = sharded(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=rf"its index {index.name} is not"):
        read_checkpoint(tmp_path / names[0])


def test_index_that_lies(tmp_path) -> None:
    index, names = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {"ghost": names[0]}}))
    with pytest.raises(CheckpointError, match="'ghost'"):
        read_checkpoint(tmp_path)
    for bad in ('{}', '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", "",
                '{"weight_map": {"a": 3}}'):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            read_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "..\\secret.safetensors",
                                   "/etc/secret.safetensors", "C:secret.safetensors", "..", "",
                                   "inner/secret.safetensors", "secret\0.safetensors"])
def test_index_cannot_leave_its_folder(shard, tmp_path) -> None:
    save_file(ONE, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    save_file(ONE, folder / "inner" / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(ONE, shard)}))
    with pytest.raises(CheckpointError, match="only files in its own folder"):
        read_checkpoint(folder)


def test_pathological_names(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError):
        read_checkpoint("a\0b.safetensors")
    with pytest.raises(CheckpointError):
        read_checkpoint("x" * 5000 + ".safetensors")
    for name in ("m.onnx", "m"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"not supported.*\.safetensors.*\.pth"):
            read_checkpoint(tmp_path / name)
