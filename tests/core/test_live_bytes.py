"""The benchmark that counts memory: what it counts, and that it misses nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import pixart_core as pc
from benchmarks import training_bytes
from benchmarks.live_bytes import LiveBytes
from benchmarks.small_memory import META, placeholder, text_phase
from benchmarks.training import recipe_at_full_size, write_random_model
from benchmarks.training_bytes import count
from benchmarks.workspaces import CUBLAS
from pixart_core.text.t5_file import T5Config


def megabytes(count):
    return torch.empty(count << 20, dtype=torch.uint8, device=META)


def counted(run):
    counter = LiveBytes()
    with torch.no_grad(), counter:
        run()
    return counter


def linear(name, rows, columns, x):
    stored = placeholder(name, torch.Size((rows, columns)))
    return counted(lambda: stored.format.linear(x, stored.tensors, None)).peak


def test_a_storage_at_the_address_of_one_that_is_gone_counts():
    """Arguments from before are not counted, and must not hide what is made after they went."""
    def run():
        for _ in range(50):
            older = [megabytes(1) for _ in range(20)]
            with counter:
                _ = [t + 1 for t in older]
            del older, _
            with counter:
                _ = [megabytes(1) for _ in range(20)]
            assert counter.now == 20 << 20
            del _
            assert counter.now == 0

    counter = LiveBytes()
    run()


def test_the_peak_is_of_what_is_alive_at_a_time():
    def run():
        for _ in range(3):
            first = megabytes(2)
            second = first.view(1024, -1)
            del first
            second + 1

    assert counted(run).peak == 4 << 20


def test_int8_products_hold_their_codes_and_sums():
    x = torch.empty(4096, 1152, dtype=torch.bfloat16, device=META)
    expected = 4096 * (1152 + 4) + 4096 * 4608 * (4 + 2) + CUBLAS
    assert linear("int8", 4608, 1152, x) == expected


def test_svdquant_keeps_the_buffers_of_each_size_once():
    """Layers of one width share them; those of another have their own, which stay."""
    x = torch.empty(4000, 1152, dtype=torch.bfloat16, device=META)
    size = 4096 * (1152 // 2 + 2 * (1152 // 64 + 32))
    stored = placeholder("svdquant", torch.Size((1152, 1152)))

    def run():
        for _ in range(3):
            stored.format.linear(x, stored.tensors, None)

    counter = counted(run)
    assert counter.now == size
    assert counter.peak == size + 2 * 4096 * 1152


def test_int4_products_of_many_tokens_unpack_the_weight():
    few, many = (linear("int4", 1152, 1152, torch.empty(rows, 1152, dtype=torch.bfloat16,
                                                        device=META)) for rows in (256, 257))
    assert few == 2 * 256 * 1152
    assert many == 9 * 1152 * 1152


@pytest.mark.parametrize(("precision", "numbers"), [("bf16", 1), ("int8", 2)])
def test_t5_computes_in_float32_as_the_host_does(precision, numbers):
    """Each matrix becomes one of float32 for its product; to unpack int8 takes two at a time."""
    config = T5Config(d_model=256, d_kv=64, d_ff=2048, num_layers=1, num_heads=4, vocab_size=64)
    phase = text_phase(precision, 2, config)
    largest = 4 * 256 * 2048
    assert numbers * largest < phase.rest < (numbers + 0.1) * largest


def narrow_model(folder, depth):
    """A file of random weights, and its config."""
    config = pc.PRESETS["alpha-256"].replace(hidden_size=96, num_heads=4, depth=depth,
                                             mlp_hidden_size=192, caption_channels=32)
    path = folder / "model.safetensors"
    write_random_model(path, config)
    return path, config


@pytest.mark.parametrize("name", ["lcm", "controlnet"])
def test_a_training_step_holds_weights_and_the_optimisers_state(name, tmp_path):
    """Protects the counted bytes of training: after a step there are the weights and two numbers
    for each that is trained, and checkpointing lowers the peak between."""
    path, config = narrow_model(tmp_path, depth=3)
    held = []
    for checkpointing in (True, False):
        recipe = recipe_at_full_size(name, path, config, tmp_path, 4, 256, steps=2,
                                     precision="bf16", checkpointing=checkpointing)
        trained = sum(p.nbytes for p in recipe.trained.parameters() if p.requires_grad)
        frozen = sum(p.nbytes for m in recipe.frozen() for p in m.parameters())
        held.append(count(recipe))
        assert held[-1].weights >= trained + frozen
        # beside the state: one step counter for each tensor
        assert 2 * trained <= held[-1].after - held[-1].weights < 2.1 * trained
        assert not isinstance(next(recipe.trained.parameters()).data, FakeTensor)
    assert held[0].peak < 0.9 * held[1].peak
    assert held[0].peak > held[0].after + trained  # gradients are there before the state is used


def test_a_counted_step_attends_in_its_own_precision(tmp_path, monkeypatch):
    """Protects the count of a GPU's step from what a CPU needs: attention in 16 bits, not in 32."""
    path, config = narrow_model(tmp_path, depth=1)
    inner, seen = training_bytes.fused, set()

    def watched(q, k, v, mask):
        seen.update((q.dtype, k.dtype, v.dtype))
        return inner(q, k, v, mask)

    monkeypatch.setattr(training_bytes, "fused", watched)
    training_bytes.count(recipe_at_full_size("lcm", path, config, tmp_path, 1, 256, steps=1,
                                             precision="bf16", checkpointing=False), steps=1)
    assert seen == {torch.bfloat16}
