"""The training loop: resuming, several processes, stopping, and what a run leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_samples import DENOISERS, MemorySamples, files_equal, losses, start, write_model

import pixart_core as pc
from pixart_core.checkpoint.header import CheckpointError
from pixart_core.training import checkpoint as run_checkpoint
from pixart_core.training.checkpoint import checkpoints_in, pack_optimizer, unpack_optimizer
from pixart_core.training.curves import grid
from pixart_core.training.loop import train
from pixart_core.training.optimizers import learning_rate
from pixart_core.training.recipes import recipe_settings
from pixart_core.training.settings import RunSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("training") / "model.safetensors")


@pytest.mark.parametrize("name", DENOISERS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name, model, tmp_path):
    """Protects exact resuming: the same losses, and bit for bit the same files."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(start(name, whole, model, steps=4, gradient_accumulation=2))
    for steps in (2, 4):
        train(start(name, parts, model, steps=steps, gradient_accumulation=2))
    assert len(losses(whole)) == 4 and losses(parts) == losses(whole)
    assert files_equal(whole, parts)


@pytest.mark.parametrize("name", DENOISERS)
def test_what_a_run_leaves_loads_and_differs_from_its_start(name, model, tmp_path):
    """Protects the hand-over: our loaders read the files, and training changed something."""
    outcome = train(start(name, tmp_path, model, steps=2))
    path, = outcome.files
    base = pc.load_transformer(model)
    if name == "controlnet":
        net = pc.load_controlnet(path, base=base.config)
        assert net.config.depth == 2 and net.controlnet[1].after_proj.weight.abs().max() > 0
        return
    before = {n: v.clone() for n, v in base.state_dict().items()}
    if name.endswith("lora"):
        pc.apply_lora(base, path)
        after = base.state_dict()
    else:
        after_model = pc.load_transformer(path)
        assert after_model.config.distilled == ("lcm" if name == "lcm" else None)
        after = after_model.state_dict()
    changed = [n for n in before if not torch.equal(before[n], after[n].to(before[n]))]
    assert any("blocks.1.attn.qkv" in n for n in changed)


@pytest.mark.parametrize("name", ["base", "lcm", "controlnet"])
def test_a_recipe_learns_what_it_sees_again_and_again(name, model, tmp_path):
    """Protects the sign and the wiring of the whole step: the loss falls on four samples."""
    samples = MemorySamples(count=4, control=True)

    class Same(MemorySamples):
        def batch(self, index, size, rank=0, world=1):
            return samples._rows(range(4))  # one batch, one draw of noise

    recipe = start(name, tmp_path, model, Same(count=4, control=True), steps=20, batch_size=4,
                   learning_rate=5e-3, caption_dropout=0.0)
    train(recipe)
    curve = losses(tmp_path)
    assert curve[-1] < 0.75 * curve[0]


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from training_samples import start
from pixart_core.training.loop import train
for name, changes in {jobs!r}.items():
    train(start(name, Path({out!r}) / name, Path({model!r}), steps=3, batch_size=2, **changes))
"""


def _run(script, port):
    """Run a script in two processes that talk over gloo, as torchrun starts them."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    started = []
    for rank in range(2):
        env = inherited | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                           "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        started.append(subprocess.Popen([sys.executable, "-c", script], env=env,
                                        stderr=subprocess.PIPE, text=True))
    for process in started:
        error = process.communicate(timeout=280)[1]
        assert process.returncode == 0, error[-2000:]


def _free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one_with_twice_the_batch(model, tmp_path):
    """Protects training on several devices: losses within 1e-5 of those of one process."""
    here = Path(__file__).parent
    jobs = {"lcm": {}, "controlnet": {}, "lora": {"class_data": "class"}}
    paths = [str(here), str(here.parents[1])]
    _run(SCRIPT.format(paths=paths, jobs=jobs, out=str(tmp_path / "two"), model=str(model)),
         _free_port())
    for name, changes in jobs.items():
        train(start(name, tmp_path / "one" / name, model, steps=3, batch_size=4, **changes))
        one, two = (losses(tmp_path / count / name) for count in ("one", "two"))
        assert len(one) == len(two) == 3
        assert all(abs(a - b) < 1e-5 * abs(a) for a, b in zip(one, two, strict=True))


def test_ctrl_c_ends_the_step_and_loses_nothing(model, tmp_path):
    """Protects a clean stop: a checkpoint at the step that ran, from which the run goes on."""

    class Interrupting(MemorySamples):
        def batch(self, index, size, rank=0, world=1):
            if index == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(index, size, rank, world)

    before = signal.getsignal(signal.SIGINT)
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    outcome = train(start("base", parts, model, Interrupting(), steps=5))
    assert (outcome.step, outcome.stopped) == (3, True)
    assert signal.getsignal(signal.SIGINT) is before
    assert outcome.files[0].is_file()
    train(start("base", parts, model, MemorySamples(), steps=5))
    train(start("base", whole, model, MemorySamples(), steps=5))
    assert losses(parts) == losses(whole) and files_equal(parts, whole)


def test_a_full_disk_is_said_and_older_checkpoints_stay(model, tmp_path, monkeypatch):
    train(start("base", tmp_path, model, steps=1))
    usage = type(shutil.disk_usage("/"))(10**12, 10**12, 10_000)
    monkeypatch.setattr(run_checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"disk is full.*GB are free.*go on from the last"):
        train(start("base", tmp_path, model, steps=2))
    assert [c.name for c in checkpoints_in(tmp_path)] == ["step-00000001"]
    monkeypatch.undo()
    assert train(start("base", tmp_path, model, steps=2)).step == 2


def test_a_checkpoint_that_breaks_off_is_never_seen(model, tmp_path, monkeypatch):
    """Protects whole-or-not: a write that fails leaves no folder that a run would go on from."""
    def broken(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(run_checkpoint, "write_checkpoint", broken)
    with pytest.raises(CheckpointError, match="disk on fire"):
        train(start("base", tmp_path, model, steps=1))
    assert not any((tmp_path / "checkpoints").iterdir())


def test_only_the_last_checkpoints_are_kept(model, tmp_path):
    train(start("base", tmp_path, model, steps=5, save_every=1, keep=2))
    assert [c.name for c in checkpoints_in(tmp_path)] == ["step-00000004", "step-00000005"]


def test_checkpoints_are_models_themselves(model, tmp_path):
    """Protects the promise that loaders read a run's checkpoints, not only its last word."""
    train(start("base", tmp_path, model, steps=1))
    folder, = checkpoints_in(tmp_path)
    assert pc.load_transformer(folder / "average.safetensors").config.depth == 3


def test_other_settings_in_the_same_folder_are_refused(model, tmp_path):
    train(start("base", tmp_path, model, steps=1))
    with pytest.raises(ValueError, match=r"other settings: learning_rate is 0.001 there and 0.5"):
        train(start("base", tmp_path, model, steps=2, learning_rate=0.5))
    with pytest.raises(CheckpointError, match="of a 'base' run, this is 'lora'"):
        train(start("lora", tmp_path, model, steps=2))


def test_a_run_from_before_a_setting_existed_goes_on(model, tmp_path):
    """Protects long runs from an update: what a setting does by default is what the run did."""
    train(start("base", tmp_path, model, steps=1))
    file = checkpoints_in(tmp_path)[-1] / "state.json"
    state = json.loads(file.read_text())
    assert state["settings"].pop("gradient_accumulation") == 1
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="gradient_accumulation is 1 there and 2 here"):
        train(start("base", tmp_path, model, steps=2, gradient_accumulation=2))
    assert train(start("base", tmp_path, model, steps=2)).step == 2


def test_a_damaged_checkpoint_is_named(model, tmp_path):
    train(start("base", tmp_path, model, steps=1))
    folder, = checkpoints_in(tmp_path)
    (folder / "trained.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="step-00000001 does not fit this run or is damaged"):
        train(start("base", tmp_path, model, steps=2))


def test_divergence_stops_the_run(model, tmp_path):
    """Protects against hours of NaN: the step and what to try are named, nothing is saved."""

    class Broken(MemorySamples):
        def batch(self, index, size, rank=0, world=1):
            batch = super().batch(index, size, rank, world)
            if index == 1:
                batch.latents.fill_(float("nan"))
            return batch

    with pytest.raises(ValueError, match=r"loss is nan at step 2.*lower learning_rate"):
        train(start("base", tmp_path, model, Broken(), steps=4))
    assert checkpoints_in(tmp_path) == []


def test_half_precision_keeps_the_time_path_float32(model, tmp_path):
    """Protects bf16 training: close to float32, weights stay float32."""
    curves = {}
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        recipe = start("base", out, model, steps=2, precision=precision)
        train(recipe)
        curves[precision] = losses(out)
        assert {p.dtype for p in recipe.trained.parameters()} == {torch.float32}
    assert curves["no"] != curves["bf16"]
    assert curves["bf16"] == pytest.approx(curves["no"], rel=2e-2)
    hidden = recipe.trained.t_embedder(torch.tensor([[999.0]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(recipe.trained.t_embedder(torch.tensor([[999.0]])), hidden)


def test_half_precision_on_a_cpu_attends_in_float32(model, tmp_path):
    """Protects its speed there: fused attention is slow backward in bfloat16."""
    recipe = start("base", tmp_path, model, steps=1, precision="bf16")
    inner, seen = recipe.trained.attention, set()

    def watched(q, k, v, mask):
        seen.update((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
        return inner(q, k, v, mask)

    recipe.trained.attention = watched
    train(recipe)
    assert seen == {torch.float32, False}


def test_gradient_checkpointing_changes_nothing(model, tmp_path):
    """Protects recomputation: bit for bit the same run."""
    for on in (False, True):
        train(start("controlnet", tmp_path / str(on), model, steps=2, gradient_checkpointing=on))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_samples_are_drawn_and_kept(model, tmp_path):
    """Protects the sample grids: a picture at the steps that the settings name."""
    recipe = start("base", tmp_path, model, steps=4, sample_every=2)
    recipe.sample = lambda step: torch.full((3, 3, 8, 8), step / 4)
    train(recipe)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-00000002.png", "step-00000004.png"]
    picture = grid(torch.rand(5, 3, 8, 6), columns=4)
    assert picture.shape == (3, 2 * 10 + 2, 4 * 8 + 2)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_recipe_draws_latents_from_what_it_trains(name, model, tmp_path):
    """Protects the samples of every recipe: through its own sampler, finite, of the right size."""
    recipe = start(name, tmp_path, model, steps=1, sample_steps=2, vae=tmp_path / "none")

    class Decoder:
        def decode(self, latents):
            return latents

    recipe._vae = Decoder()
    drawn = recipe.sample(0)
    assert drawn.shape == (8, 4, 8, 6) and drawn.isfinite().all()


def test_optimizer_states_survive_without_pickle():
    weights = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.randn(3)
    optimizer.step()
    tensors, scalars = pack_optimizer(optimizer.state_dict())
    state = unpack_optimizer(tensors, json.loads(json.dumps(scalars)))
    before = optimizer.state_dict()
    assert state["param_groups"] == before["param_groups"]
    for index, values in before["state"].items():
        assert all(torch.equal(state["state"][index][name], v) for name, v in values.items())


def test_a_state_within_a_state_survives_too():
    """Protects the 8-bit optimiser, which keeps what it packed in a dict of its own: no checkpoint
    could be written. Parameters without one have plain tensors beside it."""
    packed = {"state1": torch.arange(4, dtype=torch.uint8), "qmap1": torch.rand(256), "note": None}
    given = {"state": {0: {"step": 7, "quantized": packed}, 1: {"step": 7, "quantized": {}},
                       2: {"step": torch.tensor(7.0), "exp_avg": torch.rand(3)}},
             "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1, 2]}]}
    tensors, scalars = pack_optimizer(given)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    back = unpack_optimizer(tensors, json.loads(json.dumps(scalars)))
    assert back["param_groups"] == given["param_groups"]
    found, own = back["state"][0]["quantized"], back["state"][2]
    assert found.keys() == packed.keys() and found["note"] is None and back["state"][0]["step"] == 7
    assert torch.equal(found["state1"], packed["state1"])
    assert torch.equal(found["qmap1"], packed["qmap1"])
    assert back["state"][1] == {"step": 7, "quantized": {}}
    assert torch.equal(own["exp_avg"], given["state"][2]["exp_avg"]) and own["step"] == 7


def test_the_learning_rate_warms_up_and_falls():
    settings = RunSettings(out=Path("x"), steps=100, learning_rate=1.0, warmup_steps=9,
                           schedule="cosine")
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], rel=1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 30, rel=0.01)


@pytest.mark.parametrize(("changes", "message"), [
    ({"step": 3}, "unknown setting step"),
    ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast'; a number was expected"),
    ({"precision": "int8"}, "precision is 'int8'; use one of no, bf16, fp16"),
    ({"caption_dropout": 2.0}, "caption_dropout is 2.0"),
    ({"model": None}, "model is None"),
    ({"ema_decay": 1.0}, "ema_decay is 1.0"),
])
def test_wrong_settings_are_named(changes, message, tmp_path):
    good = {"out": tmp_path, "data": tmp_path, "model": tmp_path}
    with pytest.raises(ValueError, match=message):
        recipe_settings("base", good, changes)


def test_missing_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data, model must be given"):
        recipe_settings("base", {"out": tmp_path})


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"),
                                               ("came", "came_pytorch")])
def test_a_missing_optimizer_says_what_to_install(name, package, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}.*pip install"):
        train(start("base", tmp_path, model, steps=1, optimizer=name))
