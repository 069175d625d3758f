"""Finding, starting and ending the host: what goes wrong there is said clearly."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import (
    HostMissingError,
    HostStartError,
    check_packs,
    end_process,
    find_host,
    missing_requirements,
)


def test_a_path_without_comfyui_is_refused_with_the_way_to_get_one(tmp_path):
    with pytest.raises(HostMissingError, match=r"COMFYUI_PATH=.*; set COMFYUI_PATH to"):
        find_host({"COMFYUI_PATH": str(tmp_path)})


def test_comfyui_python_goes_before_the_virtual_environment(installation):
    environ = {"COMFYUI_PATH": str(installation.path), "COMFYUI_PYTHON": sys.executable}
    assert find_host(environ).python == Path(sys.executable)


def test_without_a_host_the_suite_skips_with_one_line(tmp_path, repository):
    command = [sys.executable, "-m", "pytest", "tests/host/test_launch.py", "-p",
               "no:cacheprovider", "-k", "not one_line"]
    env = os.environ | {"COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert done.returncode == 0, done.stdout
    assert len(skipped) == 1, done.stdout
    assert "no ComfyUI at COMFYUI_PATH=" in skipped[0] and "comfy install" in skipped[0]
    assert "host suite: skipped, no ComfyUI" in done.stdout


def test_without_gguf_in_the_host_its_tests_skip_with_one_line(tmp_path, repository, installation):
    """No server is started for them, and the line says what to install and where."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    command = [sys.executable, "-m", "pytest", "tests/host/test_gguf_model.py",
               "tests/host/test_gguf_clip.py", "-p", "no:cacheprovider"]
    env = os.environ | {"COMFYUI_PATH": str(installation.path), "COMFYUI_PYTHON": str(python)}
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert done.returncode == 0, done.stdout
    assert len(skipped) == 1 and f"{python} -m pip install gguf" in skipped[0], done.stdout


def test_what_the_host_lacks_of_the_requirements_is_named(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("pytest>=7\nno-such-package>=1  # of anybody\n")
    assert missing_requirements(Path(sys.executable), file) == ["no-such-package"]


def test_a_pack_that_does_not_load_is_named(host):
    log = host.base / "server.log"
    check_packs({"probe": Path()}, log)
    for name in ("broken_import_on_purpose", "broken_entrypoint_on_purpose"):
        with pytest.raises(HostStartError, match=f"could not load the node pack {name}"):
            check_packs({name: Path()}, log)


def test_ending_a_server_ends_its_children_too():
    # The child outlives its parent's death; only a signal to the group reaches it.
    process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE,
                               start_new_session=True, text=True)
    child = int(process.stdout.readline())
    end_process(process)
    process.stdout.close()
    assert process.returncode is not None
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process lives; one that is dead but not yet reaped does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")
