"""Config fields that came from outside, checked before they are believed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..config import VARIANTS, KVCompression, PixArtConfig

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(PixArtConfig)}


def checked_fields(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields without those that are None, each of its proper type.

    Raises ValueError, naming `source`, for unknown names and for values of another type.
    """
    unknown = sorted(set(fields) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"{source} gives {', '.join(unknown)}; the config fields are "
                         f"{', '.join(_DEFAULTS)}")
    return {name: _checked(name, value, source)
            for name, value in fields.items() if value is not None}


def _checked(name: str, value: Any, source: str) -> Any:
    default = _DEFAULTS[name]
    if name == "kv_compression":
        return _compression(value, source)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, wanted = is_number and math.isfinite(value) and value == int(value) > 0, \
            "a whole number above 0"
        value = int(value) if good else value
    elif isinstance(default, float):
        good, wanted = is_number and math.isfinite(value) and value > 0, "a number above 0"
        value = float(value) if good else value
    elif name == "variant":
        good, wanted = value in VARIANTS, " or ".join(VARIANTS)
    else:
        good, wanted = isinstance(value, str), "text"
    if not good:
        raise ValueError(f"{source} gives {name}={value!r}; {wanted} was expected")
    return value


def _compression(value: Any, source: str) -> KVCompression:
    if isinstance(value, KVCompression):
        return value
    try:
        return KVCompression(**value)
    except TypeError as error:
        raise ValueError(f"{source} gives kv_compression={value!r}; an object with sampling, "
                         "factor and layers was expected") from error
