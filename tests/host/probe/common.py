"""What the probe nodes share."""

import json
from pathlib import Path

import folder_paths
from safetensors.torch import load_file


class AnyType(str):
    """An input type that accepts every link; 0.3.64 has no wildcard of its own."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")
CATEGORY = "probe"
NO_CACHE = float("nan")


def read_input(name: str) -> dict:
    """The tensors of a safetensors file in the input folder, a leading "in." cut from names."""
    return {k.removeprefix("in."): v for k, v in load_file(input_path(name)).items()}


def input_path(name: str) -> Path:
    return Path(folder_paths.get_input_directory()) / name


def output_path(name: str) -> Path:
    return Path(folder_paths.get_output_directory()) / f"{name}.safetensors"


def fingerprint(name: str) -> str:
    """Changes whenever the input file changes."""
    path = input_path(name)
    return f"{path.stat().st_mtime_ns} {path.stat().st_size}" if path.is_file() else "missing"


def report(data: object) -> dict:
    """The ui part of an output node that shows `data` as JSON."""
    return {"ui": {"text": [json.dumps(data, default=repr)]}}
