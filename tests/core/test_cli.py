"""The pixart command: what it draws, says and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from model_inputs import sizes  # noqa: E402
from PIL import Image  # noqa: E402

import pixart_core  # noqa: E402
from pixart_core.cli import app  # noqa: E402
from pixart_core.config import METADATA_KEY  # noqa: E402
from pixart_core.png import read_settings, write_png  # noqa: E402
from pixart_core.starter import find_starter  # noqa: E402
from pixart_core.training.evaluate import detect  # noqa: E402

ROOT = Path(__file__).parents[2]
STARTER = find_starter()
PROMPT = "a large red circle in the centre on a blue background"
NAMED = ["--model", str(STARTER.transformer), "--t5", str(STARTER.t5_file), "--vae",
         str(STARTER.vae)]


def commands(group, *names):
    """(names, command) of every command below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


def test_help_shows_every_word(monkeypatch):
    """Protects what an option does when it is left out: "[auto: ...]" is no markup of rich."""
    from rich.markup import render
    from typer.main import get_command

    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERMINAL_WIDTH", "500")
    checked = 0
    for names, command in commands(get_command(app)):
        shown = " ".join(typer_testing.CliRunner().invoke(app, [*names, "--help"]).stdout.split())
        for option in command.params:
            said = (option.help or "").replace("\\[", "[")
            assert said in shown, (names, option.name)
            assert render(option.help or "").plain == said, (names, option.name)
            checked += "[" in said
    assert checked > 20


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder; stdout, stderr and exit code come back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    runner = typer_testing.CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


def _fails(result, *words, code=1):
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_the_program_draws_what_it_is_asked(tmp_path):
    """Protects the very first run: a process of its own, no files named, the right picture."""
    out = tmp_path / "out.png"
    command = [sys.executable, "-m", "pixart_core.cli", "generate", PROMPT, "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "starter model" in done.stdout and "out.png" in done.stdout
    import numpy

    image = torch.from_numpy(numpy.array(Image.open(out))).permute(2, 0, 1).float() / 255
    assert image.shape == (3, STARTER.image_size, STARTER.image_size)
    seen = detect(image)
    assert seen.background == "blue" and len(seen.objects) == 1
    assert (seen.objects[0].color, seen.objects[0].size) == ("red", "large")
    kept = read_settings(out)
    assert (kept["guidance"], kept["steps"]) == (STARTER.guidance, STARTER.steps)


def test_a_picture_is_drawn_again_exactly(run, tmp_path):
    """Protects --like: the same bytes from the settings alone; options change what they name."""
    first = run("generate", PROMPT, "-o", "a.png", "--steps", 3, "--guidance", 2, "--seed", 9,
                "--negative", "star", "--no-clean", "--width", 72, "--height", 64)
    assert first.exit_code == 0, first.output
    again = run("generate", "--like", "a.png", "-o", "b.png")
    assert again.exit_code == 0, again.output
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    a, b = read_settings("a.png"), read_settings("b.png")
    assert a == b
    assert (a["prompt"], a["steps"], a["seed"], a["width"], a["height"]) == (PROMPT, 3, 9, 72, 64)
    assert a["negative_prompt"] == "star" and a["clean_caption"] is False
    assert a["sampler"] == "dpm" and a["dtype"] == "float32"
    assert len(a["files"]["transformer"]["sha256"]) == 64 and "torch" in a["versions"]
    changed = run("generate", "--like", "a.png", "-o", "c.png", "--seed", 10)
    assert changed.exit_code == 0 and read_settings("c.png")["seed"] == 10
    assert Image.open("c.png").tobytes() != Image.open("a.png").tobytes()
    assert "/" not in json.dumps(a["files"])  # names, not places on this machine


def test_the_student_is_remembered(run):
    """Protects --lcm and --like: four LCM steps without guidance, and the same file again."""
    result = run("generate", PROMPT, "--lcm")
    assert result.exit_code == 0, result.output
    kept = read_settings("pixart_0001.png")
    assert (kept["sampler"], kept["steps"], kept["guidance"]) == ("lcm", 4, 1.0)
    assert kept["files"]["transformer"]["name"] == STARTER.lcm.name
    assert run("generate", "--like", "pixart_0001.png").exit_code == 0
    pictures = [Image.open(f"pixart_000{i}.png").tobytes() for i in (1, 2)]
    assert pictures[0] == pictures[1]


def test_other_files_than_the_pictures_are_named(run, tmp_path):
    """Protects --like from drawing with other weights unnoticed."""
    assert run("generate", PROMPT, *NAMED, "-o", "a.png", "--steps", 1).exit_code == 0
    weights = load_file(str(STARTER.vae))
    weights["vae_shift"] = torch.tensor(0.1)
    save_file(weights, "other_vae.safetensors")
    other = [*NAMED[:4], "--vae", "other_vae.safetensors"]
    _fails(run("generate", "--like", "a.png", *other, "-o", "b.png"), "other_vae.safetensors",
           "--vae")
    assert not Path("b.png").exists()
    accepted = run("generate", "--like", "a.png", *other, "-o", "b.png", "--ignore-hashes")
    assert accepted.exit_code == 0, accepted.output


def test_image_to_image(run):
    """Protects --image and --strength, and that --like asks for the picture again."""
    assert run("generate", PROMPT, "-o", "a.png", "--steps", 4).exit_code == 0
    arguments = ("generate", "a large yellow circle on a blue background", "--image", "a.png",
                 "--strength", 0.4, "--steps", 2, "-o", "b.png")
    assert run(*arguments).exit_code == 0
    assert read_settings("b.png")["files"]["image"]["name"] == "a.png"
    _fails(run("generate", "--like", "b.png"), "--image", code=2)
    same = run("generate", "--like", "b.png", "--image", "a.png", "-o", "c.png")
    assert same.exit_code == 0
    assert Image.open("b.png").tobytes() == Image.open("c.png").tobytes()
    _fails(run("generate", "--like", "b.png", "--image", "c.png"), "image")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["x", "--height", "7"], ["height is 7", "multiple of 8"]),
     (["x", "--width", "20000"], ["width is 20000"]),
     (["x", "--steps", "0"], ["steps is 0"]),
     (["x", "--guidance", "-1"], ["guidance"]),
     (["x", "-o", "picture.jpg"], [".png"]),
     (["x", "-o", "nowhere/picture.png"], ["nowhere"]),
     (["x", "--model", "nowhere.safetensors"], ["nowhere.safetensors does not exist"]),
     (["x", "--model", str(STARTER.transformer)], ["no t5"]),
     (["x", "--model", str(STARTER.vae), "--t5", str(STARTER.t5), "--vae", str(STARTER.vae)],
      ["vae_starter.safetensors", "VAE"]),
     (["x", "--set", "num_heads=six"], ["num_heads='six'"]),
     (["x", "--set", "heads=6"], ["heads"]),
     (["--like", "nowhere.png"], ["nowhere.png does not exist"])],
)
def test_mistakes_are_one_red_line(run, arguments, words):
    """Protects users from tracebacks: one line that names what was given, exit code 1."""
    _fails(run("generate", *arguments), *words)


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "x", "--strength", "0.5"], ["generate", "x", "--sampler", "euler"],
     ["generate", "x", "--grid", "karras"], ["generate", "x", "--device", "tpu"],
     ["generate", "x", "--dtype", "int8"], ["generate", "x", "--steps", "many"],
     ["generate", "x", "--t5", str(STARTER.t5)], ["generate", "x", *NAMED, "--lcm"],
     ["generate", "x", "--ignore-hashes"], ["generate", "x", "--set", "num_heads"],
     ["draw"], ["convert", str(STARTER.transformer)],
     ["convert", str(STARTER.transformer), "out", "--to", "native"],
     ["convert", str(STARTER.transformer), "out.safetensors", "--dtype", "int4"],
     ["convert", str(STARTER.transformer), str(STARTER.transformer)]],
)
def test_usage_errors_have_exit_code_2(run, arguments):
    """Protects scripts that tell a wrong command line from a wrong file."""
    _fails(run(*arguments), code=2)
    assert list(Path.cwd().iterdir()) == []


def test_version(run):
    """Protects --version."""
    result = run("--version")
    assert result.exit_code == 0 and pixart_core.__version__ in result.stdout


@pytest.mark.parametrize(
    ("path", "words"),
    [(STARTER.transformer, ["PixArt transformer", "native", "num_heads", "metadata pixart_config",
                            "float16", "alpha", "0 to 8", "shapes"]),
     (STARTER.lcm, ["distilled", "lcm"]),
     (STARTER.sigma, ["PixArt transformer", "sigma", "kv_compression", "0 to 8", "0.13025"]),
     (STARTER.t5, ["T5 text encoder", "d_model", "128", "tokenizer"]),
     (STARTER.t5_file, ["T5 text encoder"]),
     (STARTER.vae, ["TAESD", "encoder and decoder", "0.18215"])],
)
def test_inspect_says_what_a_file_is(run, path, words):
    """Protects `inspect` on every starter file."""
    result = run("inspect", path)
    assert result.exit_code == 0, result.output
    for word in words:
        assert word in result.stdout, result.stdout


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_inspect_half_of_a_taesd(run, half):
    """Protects taesd_encoder and taesd_decoder files, whose tensors have numbers for names."""
    whole = load_file(ROOT / "starter" / "vae" / "vae_starter.safetensors")
    save_file({name.removeprefix(f"taesd_{half}."): tensor for name, tensor in whole.items()
               if name.startswith(f"taesd_{half}.")}, "part.safetensors")
    result = run("inspect", "part.safetensors")
    assert result.exit_code == 0
    other = {"encoder": "decoder", "decoder": "encoder"}[half]
    for words in ("TAESD", half, f"taesd_{other}.safetensors"):
        assert words in result.output


def test_inspect_other_kinds(run):
    """Protects `inspect` on LoRA, ControlNet, VAE, strangers and files without a head count."""
    save_file({"transformer.blocks.0.attn.qkv.lora_A.weight": torch.zeros(8, 16),
               "transformer.blocks.0.attn.qkv.lora_B.weight": torch.zeros(48, 8)},
              "lora.safetensors", metadata={"note": "mine"})
    save_file({f"controlnet.{i}.{name}.weight": torch.zeros(4, 4) for i in range(3)
               for name in ("before_proj", "after_proj")}, "control.safetensors")
    save_file({"some.weight": torch.zeros(2)}, "odd.safetensors")
    bare = load_file(str(STARTER.transformer))
    save_file(bare, "bare.safetensors")
    for name, words in (("lora", ["LoRA", "rank", "8 (1 layers)", "mine"]),
                        ("control", ["ControlNet", "copied blocks", "3"]),
                        ("odd", ["not known"]),
                        ("bare", ["num_heads", "unknown", "192"])):
        result = run("inspect", f"{name}.safetensors")
        assert result.exit_code == 0, result.output
        for word in words:
            assert word in result.stdout, result.stdout
    told = run("inspect", "bare.safetensors", "--set", "num_heads=6")
    assert told.exit_code == 0 and "--set" in told.stdout
    _fails(run("inspect", "odd.safetensors", "--set", "num_heads=6"), "--set")
    Path("page.safetensors").write_text("<html>")
    _fails(run("inspect", "page.safetensors"), "page.safetensors")


def _draw(run, model, out):
    result = run("generate", PROMPT, "--model", model, *NAMED[2:], "--steps", 2, "-o", out)
    assert result.exit_code == 0, result.output
    return Image.open(out).tobytes()


def test_convert_round_trip_draws_the_same(run):
    """Protects conversion: .pth -> file -> diffusers folder -> file, and the same picture."""
    weights = load_file(str(STARTER.transformer))
    torch.save({"state_dict": weights, "epoch": 1}, "trained.pth")
    heads = ("--set", "num_heads=6", "--set", "variant=alpha", "--set", "image_size=128")
    for source, target, *more in (("trained.pth", "a.safetensors", *heads),
                                  ("a.safetensors", "folder"),
                                  ("folder", "b.safetensors")):
        result = run("convert", source, target, *more)
        assert result.exit_code == 0, result.output
    pictures = [_draw(run, name, f"{i}.png") for i, name in
                enumerate((STARTER.transformer, "a.safetensors", "folder", "b.safetensors"))]
    assert len(set(pictures)) == 1
    names = load_file("folder/diffusion_pytorch_model.safetensors")
    assert "adaln_single.linear.weight" in names
    config = json.loads(Path("folder/config.json").read_text())
    assert (config["num_attention_heads"], config["sample_size"]) == (6, 16)
    assert sorted(p.name for p in Path("folder").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]


def test_a_converted_folder_is_diffusers_own(run):
    """Protects the folder against diffusers itself: it loads it and predicts the same noise."""
    import diffusers

    assert run("convert", STARTER.transformer, "folder", "--dtype", "float32").exit_code == 0
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained("folder").eval()
    ours = pixart_core.load_transformer("folder")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    size = sizes(x)
    caption = torch.randn(1, 5, 128, generator=generator)
    t = torch.tensor([500])
    with torch.no_grad():
        wanted = theirs(x, caption, t, added_cond_kwargs={
            "resolution": size["image_size"], "aspect_ratio": size["aspect_ratio"]}).sample
        found = ours(x, t, caption, **size)
        assert torch.allclose(found, wanted, atol=1e-4 * wanted.std().item())


def test_convert_dtype_metadata_and_averages(run):
    """Protects --dtype, --ema and the config that every written file carries."""
    from safetensors import safe_open

    weights = load_file(str(STARTER.transformer))
    averaged = {name: tensor * 0.5 for name, tensor in weights.items()}
    torch.save({"state_dict": weights, "state_dict_ema": averaged}, "both.pth")
    known = ("--set", "num_heads=6", "--set", "variant=alpha", "--set", "image_size=128")
    for more, factor in (((), 1.0), (("--ema",), 0.5)):
        result = run("convert", "both.pth", "x.safetensors", "--dtype", "bfloat16", *more, *known)
        assert result.exit_code == 0, result.output
        with safe_open("x.safetensors", "pt") as file:
            stored = json.loads(file.metadata()[METADATA_KEY])
            bias = file.get_tensor("t_block.1.bias")
        assert bias.dtype == torch.bfloat16
        assert torch.allclose(bias.float(), weights["t_block.1.bias"].float() * factor, atol=1e-2)
        assert stored["num_heads"] == 6 and stored["image_size"] == 128
    torch.save({"state_dict": weights}, "one.pth")
    _fails(run("convert", "one.pth", "y.safetensors", "--ema", *known), "--ema")
    _fails(run("convert", "one.pth", "y.safetensors"), "num_heads")
    _fails(run("convert", STARTER.vae, "y.safetensors"), "vae_starter.safetensors")
    _fails(run("convert", STARTER.transformer, "y.bin"), "y.bin")
    assert not Path("y.safetensors").exists()


def test_a_picture_of_another_program_is_refused(run):
    """Protects --like from a picture whose settings are missing or do not fit."""
    picture = Image.new("RGB", (8, 8))
    picture.save("plain.png")
    _fails(run("generate", "--like", "plain.png"), "plain.png")
    write_png("odd.png", picture, {"prompt": "x", "steps": "many"})
    _fails(run("generate", "--like", "odd.png"), "steps")
    write_png("old.png", picture, {"prompt": "x"})
    _fails(run("generate", "--like", "old.png"), "--ignore-hashes")


def test_without_typer_the_command_says_how_to_get_it():
    """Protects an installation without the cli extra from an import error's traceback."""
    code = ("import sys; sys.modules['typer'] = None; "
            "from pixart_core.cli import app; app()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "typer" in done.stderr and "pip install" in done.stderr
    assert "pixart-delta" not in done.stderr  # no package of that name is published
