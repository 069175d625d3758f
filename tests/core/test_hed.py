"""The HED edge detector against golden tensors of the official network, tiles, and bad files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

import pixart_core as pc
from pixart_core.model.hed import HEDDetector, merge, open_hed, spans

GOLDEN = Path(__file__).parents[1] / "golden" / "hed_random.safetensors"
NARROW = (4, 4, 6, 6, 4)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def draw(shapes, seed):
    """Weights as the golden file's metadata says; 4-D is the first rule that fits, also `norm`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:])
        weights[name] = noise / math.sqrt(fan_in) * 1.2 if len(shape) == 4 else 0.1 * noise
    return weights


@pytest.fixture(scope="module")
def weights():
    """Random weights of the released widths, those behind the golden outputs."""
    with safe_open(GOLDEN, "pt") as file:
        names = json.loads(file.metadata()["meta"])["keys"]
    shapes = {k: tuple(v.shape) for k, v in HEDDetector(device="meta").state_dict().items()}
    assert sorted(shapes) == names
    return draw(shapes, seed=77)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def file(weights, tmp_path):
    """A written file of the weights, with changes made by the test."""

    def write(change=lambda w: None, name="ControlNetHED.safetensors"):
        changed = dict(weights)
        change(changed)
        save_file(changed, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def narrow():
    """A network of few channels in float64, where equal means equal."""
    shapes = {k: tuple(v.shape) for k, v in HEDDetector(NARROW, device="meta").state_dict().items()}
    return HEDDetector.from_path(draw(shapes, seed=1), dtype=torch.float64)


def picture(height, width, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=dtype)


# the official outputs


def test_side_outputs_are_the_official_ones(file, golden):
    sides = pc.HEDDetector.from_path(file()).side_outputs(golden["in.image"] / 255)
    assert len(sides) == 5
    for n, side in enumerate(sides):
        expected = golden[f"out.side.{n}"]
        assert side.shape == expected.shape
        assert relative(side, expected) < 1e-5, f"stage {n + 1}"


def test_the_edge_map_is_the_official_one(file, golden):
    edges = pc.HEDDetector.from_path(file())(golden["in.image"] / 255)
    assert edges.shape == golden["out.edge"].shape == (1, 1, 40, 56)
    assert relative(edges, golden["out.edge"]) < 1e-5


def test_half_precision_keeps_the_offset_and_the_maps_in_float32(file, golden):
    """In bfloat16 the offset alone would be off by half a grey level."""
    detector = HEDDetector.from_path(file(), dtype=torch.bfloat16)
    assert detector.block3.convs[0].weight.dtype == torch.bfloat16
    assert detector.norm.dtype == torch.float32
    edges = detector(golden["in.image"].bfloat16() / 255)
    assert edges.dtype == torch.float32
    assert relative(edges, golden["out.edge"]) < 0.05


# files


def test_a_half_precision_file_is_computed_in_float32(file, golden):
    """As the official detector does; on its own it would stay in what the file holds."""
    halved = file(lambda w: w.update({k: v.half() for k, v in w.items()}))
    detector = HEDDetector.from_path(halved)
    assert {p.dtype for p in detector.parameters()} == {torch.float32}
    assert relative(detector(golden["in.image"] / 255), golden["out.edge"]) < 0.01
    assert open_hed(halved)["norm"].dtype == torch.float16


@pytest.mark.parametrize("wrap", [
    lambda w: w,
    lambda w: {"state_dict": w, "epoch": 3},
    lambda w: {f"module.{k}": v for k, v in w.items()},
    lambda w: {"model": {f"netNetwork.{k}": v for k, v in w.items()}},
], ids=["bare", "state_dict", "parallel", "detector"])
def test_a_pth_file_and_the_usual_wrappers(wrap, weights, tmp_path):
    """Both from a file and as a state dict the checked tensors are the same."""
    torch.save(wrap(weights), tmp_path / "ControlNetHED.pth")
    for source in (tmp_path / "ControlNetHED.pth", wrap(weights)):
        opened = open_hed(source)
        assert opened.keys() == weights.keys()
        assert all(torch.equal(opened[k], weights[k]) for k in weights)


def test_opened_tensors_can_be_written_and_read_again(file, weights, tmp_path):
    pc.write_checkpoint(tmp_path / "again.safetensors", open_hed(file()), {"format": "pt"})
    again = open_hed(tmp_path / "again.safetensors")
    assert all(torch.equal(again[k], weights[k]) for k in weights)


def _nan(weights):
    weights["block4.convs.1.weight"] = weights["block4.convs.1.weight"].clone()
    weights["block4.convs.1.weight"][3, 2, 1, 0] = float("nan")


BAD = {
    "missing": (lambda w: w.pop("block3.convs.2.bias"), ["lacks", "block3.convs.2.bias"]),
    "no_norm": (lambda w: w.pop("norm"), ["lacks", "norm"]),
    "left_over": (lambda w: w.update({"block6.convs.0.weight": torch.zeros(2)}),
                  ["unexpected", "block6.convs.0.weight"]),
    "misshapen": (lambda w: w.update({"block2.projection.weight": torch.zeros(2, 128, 1, 1)}),
                  ["block2.projection.weight", "(2, 128, 1, 1)", "(1, 128, 1, 1)"]),
    "no_shape": (lambda w: w.update({"block2.convs.0.bias": torch.zeros(())}),
                 ["has shape"]),
    "integers": (lambda w: w.update({"block2.convs.0.bias": torch.zeros(128, dtype=torch.int8)}),
                 ["block2.convs.0.bias", "int8", "floating"]),
    "nan": (_nan, ["block4.convs.1.weight", "NaN", "damaged"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(case, file):
    change, words = BAD[case]
    with pytest.raises(pc.CheckpointError) as refused:
        HEDDetector.from_path(file(change, "bad.safetensors"))
    for word in ["bad.safetensors", *words]:
        assert word in str(refused.value)


def test_another_model_is_refused_with_what_it_is(make_weights):
    with pytest.raises(pc.CheckpointError, match=r"PixArt transformer.*PixArt Model Loader"):
        HEDDetector.from_path(make_weights())


def test_a_detector_elsewhere_is_told_where_it_belongs(weights):
    with pytest.raises(pc.CheckpointError, match=r"HED edge detector.*PixArt HED Edges"):
        pc.load_transformer(weights)


# sizes


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (15, 40), (16, 16), (17, 33), (31, 47), (97, 50)])
def test_every_size_gives_edges_of_that_size(size, narrow):
    edges = narrow(picture(*size, batch=2))
    assert edges.shape == (2, 1, *size)
    assert edges.isfinite().all()
    assert edges.min() >= 0
    assert edges.max() <= 1


def test_a_tiny_image_is_the_corner_of_its_repeated_border(narrow):
    """Below 16 pixels the official network has no fifth map; nothing else changes."""
    image = picture(20, 5)
    wide = functional.pad(image, (0, 11, 0, 0), mode="replicate")
    assert torch.equal(narrow(image), narrow(wide)[..., :5])


def test_images_of_a_batch_do_not_mix(narrow):
    images = picture(40, 33, batch=3)
    together = narrow(images)
    apart = torch.cat([narrow(image[None]) for image in images])
    assert torch.allclose(together, apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("image", "words"), [
    (torch.zeros(3, 32, 32), r"\(3, 32, 32\).*\(B, 3, H, W\)"),
    (torch.zeros(1, 4, 32, 32), r"\(1, 4, 32, 32\)"),
    (torch.zeros(1, 3, 0, 32), r"\(1, 3, 0, 32\)"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8.*floating"),
])
def test_what_is_no_image_is_refused(image, words, narrow):
    with pytest.raises(ValueError, match=words):
        narrow(image)


# tiles


@pytest.mark.parametrize("size", [(387, 523), (512, 320), (257, 256), (40, 611)])
def test_tiles_change_nothing(size, narrow):
    """Sizes of no multiple of 16 too: at the inner seams and at the image's own borders."""
    image = picture(*size)
    for whole, tiled in zip(narrow.side_outputs(image), narrow.side_outputs(image, tile=256),
                            strict=True):
        assert torch.allclose(whole, tiled, rtol=0, atol=1e-9)
    edges = narrow(image)
    assert edges.std() > 0.01  # a flat picture would agree whatever the tiles do
    assert (narrow(image, tile=256) - edges).abs().max() < 1e-6


def test_the_overlap_is_what_the_last_stage_sees(narrow):
    """The reach is 90 pixels: one cell of stage 5 feels a change that far away, and no farther."""
    image = picture(16, 400).requires_grad_()
    narrow.side_outputs(image)[4][0, 0, 0, 12].backward()  # the cell of columns 192 to 207
    columns = image.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    # max pools pass the gradient of one pixel in four, so the far ends may be missed by a few
    assert 192 - 90 <= columns.min() < 192 - 80
    assert 207 + 80 < columns.max() <= 207 + 90


@pytest.mark.parametrize("tile", [256, 272, 1024])
@pytest.mark.parametrize("length", [16, 255, 256, 257, 1000, 3840, 4097])
def test_tiles_cover_all_once_and_see_no_more_than_a_tile(length, tile):
    tiles = spans(length, tile)
    assert tiles[0].start == 0
    assert tiles[-1].stop == length
    assert [t.stop for t in tiles[:-1]] == [t.start for t in tiles[1:]]
    for t in tiles:
        assert t.high - t.low <= tile
        assert t.low % 16 == t.start % 16 == 0
        assert t.low == max(t.start - 96, 0)
        assert t.high == length or t.high >= t.stop + 96


def test_the_network_never_sees_more_than_a_tile(narrow, monkeypatch):
    """Memory is bounded by the tile, not by the image."""
    sizes = []
    forward = narrow.block1.forward
    monkeypatch.setattr(narrow.block1, "forward",
                        lambda x: sizes.append(x.shape[-2:]) or forward(x))
    narrow(picture(300, 900), tile=256)
    assert len(sizes) > 4
    assert max(max(size) for size in sizes) <= 256


@pytest.mark.parametrize("tile", [0, 128, 250, 257])
def test_a_tile_that_cannot_be_is_refused(tile, narrow):
    with pytest.raises(ValueError, match=f"tile is {tile}; a multiple of 16 from 256"):
        narrow(picture(300, 300), tile=tile)


def test_progress_counts_tiles_and_can_end_the_run(narrow):
    calls = []
    narrow(picture(300, 600), tile=256, progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]
    assert len(calls) > 4

    def stop(done, _total):
        calls.append(done)
        raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        narrow(picture(300, 600), tile=256, progress=stop)
    assert calls == [1]


def test_the_merged_map_is_the_sigmoid_of_the_mean():
    """Of the logits, not a mean of probabilities, and not a sum."""
    sides = [torch.full((1, 1, 8 >> n, 6 >> n), float(n)) for n in range(3)]
    assert torch.allclose(merge(sides, (8, 6)), torch.full((1, 1, 8, 6), 1.0).sigmoid())
