"""Block formats in PyTorch against the gguf package, which follows ggml's reference code."""

import numpy as np
import pytest
import torch

from pixart_core.quant import PACKINGS, PackedTensor, dequantize
from pixart_core.quant.blocks import finite_scales

gguf = pytest.importorskip("gguf")
ROWS, BLOCKS = 5, 3


def random_blocks(kind, seed=0):
    """Rows of random bytes, the float16 scales in them finite: uint8 (ROWS, bytes of a row)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (ROWS * BLOCKS, kind.nbytes), dtype=np.uint8)
    for at in kind.scales:
        scales = rng.normal(size=(len(blocks), 1)).astype(np.float16)
        blocks[:, at: at + 2] = scales.view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", PACKINGS.values(), ids=PACKINGS)
def test_equal_to_the_last_bit(kind):
    """Any byte may stand anywhere in a block, so random bytes try every level and scale."""
    packed = random_blocks(kind)
    type_ = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[type_] == (kind.size, kind.nbytes)
    expected = gguf.quants.dequantize(packed, type_)
    found = dequantize(torch.from_numpy(packed), kind.name, (ROWS, BLOCKS * kind.size))
    np.testing.assert_array_equal(found.numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", PACKINGS.values(), ids=PACKINGS)
def test_damaged_scales_are_seen(kind):
    packed = torch.from_numpy(random_blocks(kind))
    assert finite_scales(packed, kind.name)
    for at in kind.scales:
        damaged = packed.clone()
        damaged[-1, -kind.nbytes + at + 1] = 0x7C  # infinity or NaN
        assert not finite_scales(damaged, kind.name)


def test_half_precision_is_rounded_once():
    kind = PACKINGS["Q5_1"]
    data = torch.from_numpy(random_blocks(kind))
    exact = dequantize(data, kind.name, (ROWS, -1))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(data, kind.name, (ROWS, -1), dtype), exact.to(dtype))


@pytest.mark.parametrize("kind", PACKINGS.values(), ids=PACKINGS)
def test_nothing_depends_on_the_values(kind):
    """No branch on data and no step on the CPU, or a tensor without data would fail."""
    data = torch.empty(ROWS, BLOCKS * kind.nbytes, dtype=torch.uint8, device="meta")
    found = dequantize(data, kind.name, (ROWS, BLOCKS * kind.size), torch.bfloat16)
    assert found.is_meta and found.shape == (ROWS, BLOCKS * kind.size)


def test_stacking_rows_needs_no_unpacking():
    kind = PACKINGS["Q8_0"]
    parts = [PackedTensor(torch.from_numpy(random_blocks(kind, seed)), "Q8_0",
                          torch.Size((ROWS, BLOCKS * 32))) for seed in (1, 2)]
    whole = PackedTensor.stack(parts)
    assert whole.data.dtype is torch.uint8
    assert torch.equal(whole.dense(), torch.cat([part.dense() for part in parts]))


def test_bytes_that_cannot_be_the_shape():
    with pytest.raises(ValueError, match="34 bytes of Q8_0"):
        PackedTensor(torch.zeros(34, dtype=torch.uint8), "Q8_0", torch.Size((2, 32)))
