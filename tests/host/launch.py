"""Find an installed ComfyUI and start its real server in a base directory of its own."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client import Host

MODEL_FOLDERS = ("checkpoints", "clip_vision", "configs", "controlnet", "diffusion_models",
                 "embeddings", "gligen", "hypernetworks", "loras", "photomaker", "style_models",
                 "text_encoders", "unet", "upscale_models", "vae", "vae_approx")
OPTIONAL_FLAGS = ("--disable-api-nodes", "--disable-assets-autoscan", "--dont-print-server")
LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG = 1
HOW_TO_GET_ONE = ("set COMFYUI_PATH to a ComfyUI folder that has its virtual environment in .venv "
                  "or venv (or set COMFYUI_PYTHON too), or install it at ~/comfy/ComfyUI with "
                  "`pip install comfy-cli && comfy install`")


class HostMissingError(RuntimeError):
    """No usable ComfyUI on this machine; the message says where was looked and how to get one."""


class HostStartError(RuntimeError):
    """The server ended, hung or could not import one of the packs; the message has its log."""


@dataclass(frozen=True)
class Installation:
    path: Path
    python: Path
    version: str

    def __str__(self) -> str:
        return f"ComfyUI {self.version} at {self.path}"


def find_host(environ: Mapping[str, str] = os.environ) -> Installation:
    """The ComfyUI at COMFYUI_PATH, else at ~/comfy/ComfyUI, and the Python that runs it: at
    COMFYUI_PYTHON, else in .venv or venv in or beside it. Raises HostMissingError."""
    named = environ.get("COMFYUI_PATH")
    path = Path(named).expanduser() if named else Path.home() / "comfy" / "ComfyUI"
    if not (path / "main.py").is_file():
        where = f"COMFYUI_PATH={named}" if named else "COMFYUI_PATH (not set) or ~/comfy/ComfyUI"
        raise HostMissingError(f"no ComfyUI at {where}; {HOW_TO_GET_ONE}")
    pythons = [root / venv / part for root in (path, path.parent) for venv in (".venv", "venv")
               for part in ("bin/python", "Scripts/python.exe")]
    if environ.get("COMFYUI_PYTHON"):
        pythons.insert(0, Path(environ["COMFYUI_PYTHON"]).expanduser())
    python = next((p for p in pythons if p.is_file()), None)
    if python is None:
        raise HostMissingError(f"no Python for the ComfyUI at {path}; {HOW_TO_GET_ONE}")
    found = re.search(r'__version__\s*=\s*"([^"]+)"', _read(path / "comfyui_version.py"))
    return Installation(path, python, found.group(1) if found else "(version unknown)")


@functools.cache
def has_package(python: Path, name: str) -> bool:
    """Whether the Python that runs a host can import a package."""
    command = [python, "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def missing_requirements(python: Path, requirements: Path) -> list[str]:
    """The packages of a requirements file that a Python has not, whatever their version."""
    names = re.findall(r"^[\w.-]+", _read(requirements), re.MULTILINE)
    code = ("import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
            "for name in sys.argv[1:]:\n"
            "    try:\n        version(name)\n"
            "    except PackageNotFoundError:\n        print(name)\n")
    asked = subprocess.run([python, "-c", code, *names], capture_output=True, text=True,
                           check=False)
    return asked.stdout.split()


def make_base(base: Path, packs: Mapping[str, Path]) -> None:
    """Lays out a base directory: models/*, input/, output/, ..., and a link for each node pack."""
    for name in MODEL_FOLDERS:
        (base / "models" / name).mkdir(parents=True, exist_ok=True)
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, source in packs.items():
        target = base / "custom_nodes" / name
        try:
            os.symlink(source.resolve(), target, target_is_directory=True)
        except OSError:  # a Windows account without the right to make links
            skip = shutil.ignore_patterns(".venv", ".git", "__pycache__")
            shutil.copytree(source, target, ignore=skip)


@contextlib.contextmanager
def running_host(installation: Installation, base: Path, packs: Mapping[str, Path],
                 extra_args: Sequence[str] = ("--cpu",), timeout: float = 240) -> Iterator[Host]:
    """A started server with `packs` ({folder name: source}) in custom_nodes; ended on exit.

    Its log is `base`/server.log. Raises HostStartError when the server does not answer in `timeout`
    seconds or when one of the packs fails to import.
    """
    make_base(base, packs)
    log = base / "server.log"
    port = _free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(installation, base, port, extra_args), cwd=base, env=_environment(),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_end_with_parent if LINUX else None,
        )
    stop = functools.partial(end_process, process)
    atexit.register(stop)
    try:
        host = Host(f"http://127.0.0.1:{port}", base, installation.version)
        _wait_until_up(host, process, installation, log, time.monotonic() + timeout)
        check_packs(packs, log)
        yield host
    finally:
        stop()
        atexit.unregister(stop)


def log_tail(log: Path, lines: int = 60, start: int = 0) -> str:
    """The last `lines` lines of a log from byte `start` on, without colours and caret lines."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(start)
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode(errors="replace"))
        return "\n".join([x for x in text.splitlines() if x.strip(" ^~") or not x][-lines:])
    return "(no log)"


def _command(installation: Installation, base: Path, port: int,
             extra_args: Sequence[str]) -> list[str]:
    known = _read(installation.path / "comfy" / "cli_args.py")
    return [
        str(installation.python), str(installation.path / "main.py"),
        "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base),
        "--database-url", f"sqlite:///{base / 'comfyui.db'}", "--disable-auto-launch",
        "--preview-method", "auto", "--log-stdout", *extra_args,
        *(flag for flag in OPTIONAL_FLAGS if f'"{flag}"' in known),
    ]


def _environment() -> dict[str, str]:
    """This process's environment without its Python paths, and with every download forbidden."""
    env = {k: v for k, v in os.environ.items()
           if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return env | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
                  "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1"}


def _wait_until_up(host: Host, process: subprocess.Popen, installation: Installation, log: Path,
                   deadline: float) -> None:
    while not host.alive():
        if process.poll() is not None:
            raise HostStartError(f"{installation} ended with status {process.returncode} before it "
                                 f"answered; its log:\n{log_tail(log)}")
        if time.monotonic() > deadline:
            raise HostStartError(f"{installation} did not answer in time; its log:\n"
                                 f"{log_tail(log)}")
        time.sleep(0.1)


def check_packs(packs: Mapping[str, Path], log: Path) -> None:
    """Raises HostStartError if the log says that one of the packs could not be loaded."""
    complaints = ("IMPORT FAILED", "Error while calling comfy_entrypoint", "Cannot import",
                  "Skip ")
    for line in _read(log).splitlines():
        for name in packs:
            if f"custom_nodes{os.sep}{name}" in line and any(c in line for c in complaints):
                raise HostStartError(f"ComfyUI could not load the node pack {name}; its log:\n"
                                     f"{log_tail(log, 120)}")


def _end_with_parent() -> None:
    """In the new process: asks Linux to end it should this one be killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_process(process: subprocess.Popen) -> None:
    """Ends the server and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
