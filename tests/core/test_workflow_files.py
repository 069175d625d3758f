"""`pixart workflow upgrade`: which files it reads and writes, and what it refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from workflow_documents import ROOT, golden

from pixart_core.workflow import WorkflowError, read_workflow, upgrade, write_workflow


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `pixart workflow upgrade` in an empty folder."""
    testing = pytest.importorskip("typer.testing")
    from pixart_core.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    runner = testing.CliRunner()
    return lambda *words: runner.invoke(app, ["workflow", "upgrade", *map(str, words)])


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(golden("alpha_2023")), encoding="utf-8")
    return path


def fails(result, *words, code=1):
    assert result.exit_code == code, result.output
    missing = [word for word in words if word not in result.stderr]
    assert not missing and "Traceback" not in result.output, result.stderr


def test_the_command_writes_beside_and_lists(run, old):
    before = old.read_bytes()
    result = run(old)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("old.pixart.json").read_text()) == upgrade(golden("alpha_2023"))[0]
    assert old.read_bytes() == before
    for word in ("PixArtT5TextEncode", "KSampler", "diffusion_models", "7 upgraded, 0 left"):
        assert word in result.stdout
    fails(run(old), "old.pixart.json is there already", "--output")


def test_output_in_place_and_dry_run(run, old, tmp_path):
    before = old.read_bytes()
    assert run(old, "--dry-run").exit_code == 0 and sorted(tmp_path.iterdir()) == [old]
    fails(run(old, "-o", old), "--in-place")
    fails(run(old, "-o", "x.png"), ".json")
    fails(run(old, "-o", "no/x.json"), "does not exist")
    fails(run(old, "-o", "x.json", "--in-place"), code=2)
    assert old.read_bytes() == before
    assert run(old, "-o", "x.json").exit_code == 0 and old.read_bytes() == before
    old.chmod(0o640)
    assert run(old, "--in-place").exit_code == 0
    assert old.read_bytes() == Path("x.json").read_bytes() and old.stat().st_mode & 0o777 == 0o640


def test_nothing_to_upgrade_writes_nothing(run, tmp_path):
    template = ROOT / "workflows" / "PixArt-alpha text to image.json"
    result = run(template, "-o", "x.json")
    assert result.exit_code == 0 and "nothing to upgrade" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "words"), [
    (b"{", "not JSON"), (b"\xff\xd8\xff", "neither JSON nor a PNG"), (b"[1]", "a list"),
    (b"{}", "empty"), (b'{"a": 1}', "no ComfyUI workflow"), (b'"x"', "a str"),
    (b'{"nodes": [{}], "links": []}', "no id"), (b'{"nodes": [], "version": 7}', "version 7"),
    (b'{"nodes": [], "links": [[1]]}', "a link is [1]"), (b"[" * 100_000, "not JSON"),
    (b'{"nodes": [], "links": 3}', "a list was expected"),
    (b'{"1": {"class_type": 3, "inputs": {}}}', "node 1"),
    (b"\x89PNG\r\n\x1a\nbroken", "not a sound PNG")])
def test_other_files_are_refused(run, tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    fails(run(path), "x.json", words)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there(run):
    fails(run("none.json"), "does not exist")


@pytest.fixture
def picture(tmp_path):
    """A picture as ComfyUI saves it, with both graphs."""
    chunks, path = PngInfo(), tmp_path / "picture.png"
    prompt = json.dumps(golden("api_alpha"))[:-1] + ', "20": {"class_type": "X", "inputs": {}, ' \
        '"is_changed": [NaN]}}'
    chunks.add_text("prompt", prompt)
    chunks.add_text("workflow", json.dumps(golden("alpha_2023")))
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_a_picture_gives_the_workflow_or_the_prompt(run, picture):
    before = picture.read_bytes()
    assert run(picture, "-o", "page.json").exit_code == 0
    assert run(picture, "--api", "-o", "api.json").exit_code == 0
    assert json.loads(Path("page.json").read_text()) == upgrade(golden("alpha_2023"))[0]
    api = json.loads(Path("api.json").read_text(), parse_constant=pytest.fail)
    assert api["7"]["class_type"] == "KSampler" and api["20"]["is_changed"] == [None]
    fails(run(picture, "--in-place"), "picture", "--output")
    assert picture.read_bytes() == before


def test_a_picture_without_a_workflow(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    fails(run("p.png"), "no workflow and no prompt")


def test_what_is_posted_to_the_server_is_upgraded_inside():
    """{"prompt": ..., "extra_data": {"extra_pnginfo": {"workflow": ...}}}: both agree."""
    after, report = upgrade({"prompt": golden("api_alpha"), "client_id": "x", "extra_data": {
        "extra_pnginfo": {"workflow": golden("alpha_2023")}}})
    assert after["prompt"] == upgrade(golden("api_alpha"))[0]
    assert after["extra_data"]["extra_pnginfo"]["workflow"] == upgrade(golden("alpha_2023"))[0]
    assert after["client_id"] == "x" and report.upgraded


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "w.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_workflow(path, {"a": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_in_every_language_survives_a_file(tmp_path):
    document = {"1": {"class_type": "X", "inputs": {"text": "一只猫 🎨 \ud83d"}}}
    write_workflow(tmp_path / "w.json", document)
    assert read_workflow(tmp_path / "w.json") == document


def test_errors_are_value_errors():
    """Callers of the engine catch ValueError."""
    with pytest.raises(ValueError, match="JSON object"):
        upgrade([])
    assert issubclass(WorkflowError, ValueError)
