"""What `pixart quantize` writes, in the host: by its stock loader and by ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checks import relative, saved
from graphs import Graph

import pixart_core as pc
from pixart_core.config import LATENT_SCALE
from pixart_core.quant.policy import METHODS
from pixart_core.quantize.network import open_network, round_network, write_network

sys.path.append(str(Path(__file__).parents[1] / "core"))
from quantize_models import make_captions, make_control, make_model, write

CALIBRATED = ("--method", "svdquant", "--steps", "1", "--rank", "16", "--rows", "40")
# how far the stock loader may be from ours: int8 activations are rounded by another path there
BARS = {"int8": 0.01, "fp8": 1e-5, "mxfp8": 1e-5, "nvfp4": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


def rounded(path, method):
    """The file that `pixart quantize --method` makes of a model, beside it."""
    network = open_network(path, "pixart", {})
    target = path.with_name(f"{path.stem}_{method}.safetensors")
    write_network(target, network, round_network(network, METHODS[method]), torch.float16,
                  {"method": method})
    return target


def probe(graph, host, inputs, name, loader, path, **settings):
    file = host.add_model("diffusion_models", path)
    key = "unet_name" if loader == "UNETLoader" else "model_name"
    model = graph.add(loader, **{key: file}, **settings)
    graph.add("ProbeApplyModel", model=model, name=name,
              file=host.write_tensors("quantised_inputs", inputs))
    return model


@torch.no_grad()
def engine(path, inputs, *control):
    model = pc.load_transformer(path, dtype=torch.float32)
    return model(inputs["x"], inputs["timestep"], inputs["caption"], control=control)[:, :4]


@pytest.fixture(scope="module")
def wide(folder):
    """One block of Sigma XL, for the host's own PixArt knows one width; and inputs."""
    config = pc.PRESETS["sigma-512"].replace(depth=1)
    generator = torch.Generator().manual_seed(0)
    network = pc.PixArtTransformer(config, device="meta")
    weights = {name: 0.03 * torch.randn(t.shape, generator=generator)
               for name, t in network.state_dict().items()}
    path = write(folder / "wide.safetensors", {n: t.half() for n, t in weights.items()}, config)
    return path, {"x": torch.randn(1, 4, 40, 40, generator=generator),
                  "timestep": torch.tensor([500.0]),
                  "caption": torch.randn(1, 5, 4096, generator=generator)}


@pytest.mark.parametrize("method", list(BARS))
def test_the_stock_loader_reads_comfyuis_own_formats(host, installation, wide, method):
    """And predicts what our loader and the engine do, which differs from the original's."""
    path, inputs = wide
    name = METHODS[method].format.name
    known = installation.path / "comfy" / "quant_ops.py"
    if not known.is_file() or f'"{name}"' not in known.read_text(encoding="utf-8"):
        pytest.skip(f"this ComfyUI does not know {name}")
    file = rounded(path, method)
    graph = Graph()
    probe(graph, host, inputs, "stock", "UNETLoader", file, weight_dtype="default")
    probe(graph, host, inputs, "ours", "PixArtLoader", file, weight_dtype="float32")
    host.run(graph)
    expected, original = engine(file, inputs), engine(path, inputs)
    stock, ours = (saved(host, name, "eps") for name in ("stock", "ours"))
    assert relative(ours, expected) < 1e-3
    assert relative(stock, expected) < BARS[method]
    assert relative(original, expected) > 1e-3


@pytest.fixture(scope="module")
def small(folder):
    """A model of one block, and it by every method."""
    typer_testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    path = make_model(folder / "small.safetensors", depth=1)
    captions = make_captions(folder / "captions.safetensors")
    files = {method: rounded(path, method) for method, m in METHODS.items() if not m.calibrated}
    files["svdquant"] = folder / "small_svdquant.safetensors"
    done = typer_testing.CliRunner().invoke(app, [
        "quantize", str(path), str(files["svdquant"]), *CALIBRATED, "--embeddings", str(captions)])
    assert done.exit_code == 0, done.output
    return files


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(8)
    return {"x": torch.randn(2, 4, 4, 4, generator=generator),
            "timestep": torch.tensor([900.0, 250.0]),
            "caption": torch.randn(2, 5, 16, generator=generator)}


def test_our_loader_predicts_what_the_engine_does(host, small, inputs):
    """All six methods in one prompt."""
    graph = Graph()
    for method, path in small.items():
        probe(graph, host, inputs, method, "PixArtLoader", path, weight_dtype="float32")
    host.run(graph)
    errors = {method: relative(saved(host, method, "eps"), engine(path, inputs))
              for method, path in small.items()}
    assert len(errors) == 6 and max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_quantised_controlnet_steers_as_in_the_engine(host, folder, inputs, method):
    """Its weights stay packed in the host as well."""
    base = make_model(folder / f"steered_{method}.safetensors", depth=2)
    control = make_control(folder / f"control_{method}.safetensors", base)
    network = open_network(control, "controlnet", {})
    path = folder / f"control_in_{method}.safetensors"
    write_network(path, network, round_network(network, METHODS[method]), torch.float16,
                  {"method": method})
    latent = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    graph = Graph()
    file = host.write_tensors("quantised_control", {**inputs, "control_latent": latent})
    text = graph.add("ProbeLoadConditioning", file=host.write_tensors(
        "quantised_text", {"caption": inputs["caption"]}))
    steered = graph.add(
        "PixArtControlNetApply", positive=text, strength=0.8, start_percent=0.0, end_percent=1.0,
        control_net=graph.add("PixArtControlNetLoader", weight_dtype="float32",
                              control_net_name=host.add_model("controlnet", path)),
        vae=graph.add("ProbeLatentVAE", file=file, scale=LATENT_SCALE["alpha"], label=method),
        image=graph.add("EmptyImage", width=32, height=32, batch_size=1, color=0))
    model = graph.add("PixArtLoader", model_name=host.add_model("diffusion_models", base),
                      weight_dtype="float32")
    graph.add("ProbeApplyModel", model=model, name="steered", positive=steered[0],
              file=host.write_tensors("quantised_inputs", inputs))
    host.run(graph)
    net = pc.load_controlnet(path, dtype=torch.float32)
    assert net.controlnet[0].copied_block.attn.qkv.packing
    expected = engine(base, inputs, pc.Control(net, latent, 0.8))
    assert relative(engine(base, inputs), expected) > 0.05
    assert relative(saved(host, "steered", "eps"), expected) < 1e-4
