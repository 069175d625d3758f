"""The engine stands on its own: no host imports, and it works under any package name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "pixart_core"
HOST_MODULES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "nodes", "folder_paths",
                "server", "execution", "latent_preview"}


def _imported_roots(source: str) -> list[tuple[int, str]]:
    """(line, first part of the name) of every absolute import in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, (node.module or "").split(".")[0]))
    return found


def _outside(path: Path) -> list[str]:
    """Relative imports of a module that climb out of the engine."""
    depth = len(path.relative_to(ENGINE).parts)
    return [f"{path.name}:{node.lineno}" for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level > depth]


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda p: str(p.name))
def test_module_imports_neither_the_host_nor_itself_by_name(path: Path) -> None:
    """Protects the direction of dependencies, and use as custom_nodes.<folder>.pixart_core."""
    roots = _imported_roots(path.read_text("utf-8"))
    forbidden = [(line, root) for line, root in roots if root in HOST_MODULES | {"pixart_core"}]
    assert not forbidden
    assert not _outside(path)


def test_the_walk_sees_a_forbidden_import() -> None:
    """The test above can fail: nested and aliased imports are seen."""
    source = "def f():\n    import comfy.utils as u\n    from pixart_core.config import x\n"
    assert {root for _, root in _imported_roots(source)} == {"comfy", "pixart_core"}


def test_import_needs_only_torch_and_safetensors() -> None:
    """Heavy optional packages are imported where they are used, not with the engine."""
    code = ("import sys, pixart_core, pixart_core.load, pixart_core.checkpoint; "
            "print(*sorted({'diffusers', 'transformers', 'bs4', 'ftfy', 'typer', 'rich', "
            "'accelerate'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=ENGINE.parent, check=True)
    assert result.stdout.split() == []


def test_engine_works_inside_another_package(tmp_path: Path) -> None:
    """Hosts import it as custom_nodes.<any folder>.pixart_core."""
    package = tmp_path / "custom_nodes" / "some-folder"
    package.mkdir(parents=True)
    (package / "pixart_core").symlink_to(ENGINE, target_is_directory=True)
    code = ("import importlib, sys; m = importlib.import_module("
            "'custom_nodes.some-folder.pixart_core.load'); "
            "assert 'pixart_core' not in sys.modules; print(m.load_transformer.__module__)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "custom_nodes.some-folder.pixart_core.load"


def test_quantised_weights_know_nothing_of_files_and_models() -> None:
    """Arrows point one way: readers and loaders use `quant`, and `quantize` uses them."""
    climbing = [f"{path.name}:{node.lineno}" for path in (ENGINE / "quant").rglob("*.py")
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.ImportFrom)
                and node.level > len(path.relative_to(ENGINE / "quant").parts)]
    assert climbing == []
