"""Node schemas for every supported host: what an older one does not know is left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from comfy_api.latest import io

CATEGORY = "PixArt"


def known_arguments(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def schema(**arguments: Any) -> io.Schema:
    """An io.Schema; `search_aliases` and the like need a host that has them."""
    return io.Schema(**known_arguments(io.Schema, arguments))


def advanced(input_type: Callable, id: str, **arguments: Any) -> Any:
    """An input that newer hosts fold away under "advanced"."""
    arguments = {"optional": True, "advanced": True, **arguments}
    return input_type(id, **known_arguments(input_type, arguments))


def require_option(name: str, value: Any, options: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `options`.

    The host looks at what is chosen on the node; not at wires, and 0.3.64 not at all.
    """
    if value not in options:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(options)}")
