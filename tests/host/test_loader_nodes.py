"""PixArt Model Loader: every container, dtype and variant."""

import json

import pytest
import torch
from checks import choices, lcm_latents, parted, relative, saved, starter_file
from graphs import LCM, MODEL, PROMPT, TOKENS, Graph
from safetensors.torch import save_file

from pixart_core.checkpoint.convert import convert_state_dict
from pixart_core.starter import find_starter

STARTER = find_starter()
SCALE = 0.18215  # of SD 1.5 latents: what the network sees is the host's latent times this


CONFIG = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 6,
          "attention_head_dim": 32, "sample_size": 16, "patch_size": 2, "interpolation_scale": 1.0,
          "_name_or_path": "PixArt-alpha"}


def write_layout(host, layout):
    """The student's weights in another container; (name, loader inputs)."""
    weights, metadata = starter_file()
    models = host.models_dir / "diffusion_models"
    if layout in ("pth", "pth_ema", "diffusers_folder"):
        folder = models / f"layout_{layout}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        if layout == "diffusers_folder":
            save_file(parted(convert_state_dict(weights, "diffusers")),
                      folder / "diffusion_pytorch_model.safetensors")
            return "layout_diffusers_folder/", {}
        entry = "state_dict" if layout == "pth" else "state_dict_ema"
        torch.save({entry: weights, "epoch": 3}, folder / "student.pth")
        return f"layout_{layout}/student.pth", {}
    if layout == "prefixed":
        weights = {f"model.diffusion_model.{k}": v for k, v in weights.items()}
    if layout.startswith("diffusers"):
        weights = convert_state_dict(weights, "diffusers")
    path = models / f"layout_{layout}.safetensors"
    loader = {}
    if layout == "diffusers_variant":
        config = json.loads(metadata["pixart_config"])
        del config["variant"]
        metadata, loader = {"pixart_config": json.dumps(config)}, {"variant": "alpha"}
    save_file(parted(weights), path, metadata=metadata)
    return path.name, loader


@pytest.mark.parametrize("layout", ["pth", "pth_ema", "prefixed", "diffusers", "diffusers_variant",
                                    "diffusers_folder"])
def test_every_container_gives_the_same_latents(host, layout):
    """Bit for bit those of the native safetensors file. diffusers' need the head count from a
    config.json beside them or from the header."""
    expected = lcm_latents(host, "native")
    name, loader = write_layout(host, layout)
    assert name in choices(host, "PixArtLoader", "model_name")
    assert torch.equal(lcm_latents(host, "layout", model=name, loader=loader), expected)


def test_a_folder_stands_for_its_files_alone(host):
    """What is one model is listed once; what else lies there is still listed."""
    weights, metadata = starter_file()
    models = host.models_dir / "diffusion_models"
    for folder, names in (("one_model", ["diffusion_pytorch_model.safetensors", "other.pth"]),
                          ("two_models", ["first.safetensors", "second.safetensors"])):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / "config.json").write_text(json.dumps(CONFIG))
        for name in names:
            save_file(parted(weights), models / folder / name, metadata=metadata)
    listed = [name for name in choices(host, "PixArtLoader", "model_name")
              if name.startswith(("one_model", "two_models"))]
    assert sorted(listed) == ["one_model/", "one_model/other.pth", "two_models/first.safetensors",
                              "two_models/second.safetensors"]


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-6), ("float16", 1e-3),
                                            ("bfloat16", 3e-3), ("float8_e4m3fn", 5e-2),
                                            ("float8_e5m2", 0.1)])
def test_weight_dtypes(host, student_states, dtype, bar):
    """Each choice is used, and its epsilon stays near float32's; the file itself is float16."""
    def epsilon(dtype):
        graph = Graph()
        model = graph.add("PixArtLoader", model_name=LCM, weight_dtype=dtype)
        file = host.write_tensors("dtypes", student_states)
        graph.add("ProbeApplyModel", model=model, file=file, name=dtype)
        info = graph.add("ProbeModelInfo", model=model)
        used = host.run(graph).json(info)["inference_dtype"]
        return saved(host, dtype, "eps"), used

    (expected, _), (eps, used) = epsilon("float32"), epsilon(dtype)
    assert used == f"torch.{dtype}"
    error = relative(eps, expected)
    assert error < bar, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def student_states(encoder):
    """Inputs in the middle of a run."""
    states, mask = encoder(PROMPT, max_tokens=TOKENS)
    return {"x": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([499.0]), "caption": states[:, : int(mask.sum())]}


@pytest.mark.parametrize(("variant", "latents"), [("auto", "SD15"), ("alpha", "SD15"),
                                                  ("sigma", "SDXL")])
def test_variant_override(host, variant, latents):
    """What the user says counts more than the file."""
    graph = Graph()
    model = graph.add("PixArtLoader", model_name=MODEL, variant=variant)
    graph.add("ProbeModelInfo", model=model)
    assert host.run(graph).json("ProbeModelInfo")["latent_format"] == latents
