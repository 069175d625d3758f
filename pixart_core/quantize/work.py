"""The unfinished work of a quantisation in a folder beside its target, so that it can go on.

`settings.json` says what is being done, `inputs.safetensors` holds the calibration rows, and each
solved layer has a file of its own. Every file is written whole or not at all.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint.read import CheckpointError, read_checkpoint
from ..checkpoint.write import write_checkpoint
from ..quant.formats import file_tensors
from ..quant.stored import StoredWeight
from ..whole import whole_file

logger = logging.getLogger(__name__)

_SETTINGS, _INPUTS, _ERRORS = "settings.json", "inputs.safetensors", "errors"
_BIAS = "bias"
_SHOWN = 60


class SolvedLayer(NamedTuple):
    """A layer as it goes into the file: its weight, the bias that belongs to it, its errors."""

    weight: StoredWeight
    bias: Tensor | None
    errors: dict[str, float]


class WorkFolder:
    """The folder `<target>.work`; `begin` it before anything else."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.work")

    def begin(self, settings: Mapping[str, Any]) -> bool:
        """Make the folder for a job of `settings` (JSON); True where the same job goes on.

        Raises ValueError where another job was begun there, naming the first setting that differs,
        and CheckpointError where the folder cannot be written.
        """
        wanted = json.loads(json.dumps(dict(settings)))
        file = self.path / _SETTINGS
        if file.is_file():
            self._compare(_read_json(file), wanted)
            return True
        try:
            self.path.mkdir(exist_ok=True)
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
        return False

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        for name in [*now, *then]:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"{self.path} was begun with {name} {_short(then.get(name))}, this command "
                    f"says {_short(now.get(name))}; give the same settings to go on, or delete the "
                    "folder to begin again")

    def save_inputs(self, samples: Mapping[str, Tensor]) -> None:
        """Keep the calibration rows (rows, K) of each layer."""
        write_checkpoint(self.path / _INPUTS, samples, {})

    def inputs(self) -> dict[str, Tensor] | None:
        """The rows that were kept, mapped to their file; None before there are any."""
        file = self.path / _INPUTS
        return read_checkpoint(file).state_dict if file.is_file() else None

    def save_layer(self, name: str, layer: SolvedLayer) -> None:
        """Keep a solved weight `name` ("blocks.0.attn.qkv.weight")."""
        tensors = file_tensors({name: layer.weight})
        if layer.bias is not None:
            tensors[_BIAS] = layer.bias
        write_checkpoint(self._file(name), tensors, {_ERRORS: json.dumps(layer.errors)})

    def has_layer(self, name: str) -> bool:
        """Whether the weight `name` is solved."""
        return self._file(name).is_file()

    def layer(self, name: str) -> SolvedLayer | None:
        """The solved weight `name` in memory, None where it is still to do."""
        file = self._file(name)
        if not file.is_file():
            return None
        read = read_checkpoint(file, keep_packed=True)
        errors = {key: float(value) for key, value in json.loads(read.metadata[_ERRORS]).items()}
        bias = read.state_dict.get(_BIAS)
        # copies: a file that something is mapped to cannot be deleted everywhere
        return SolvedLayer(read.packed[name].to("cpu", copy=True),
                           None if bias is None else bias.clone(), errors)

    def finish(self) -> None:
        """Delete what this class has written, and the folder where nothing else is in it.

        What cannot be deleted is named in the log, and keeps its settings, so that another job
        does not take it for its own.
        """
        gc.collect()  # Windows deletes no file that tensors are mapped to
        left = [file.name for file in self.path.glob("*.safetensors") if not _deleted(file)]
        if not left and not _deleted(self.path / _SETTINGS):
            left = [_SETTINGS]
        if not left and not any(self.path.iterdir()):
            self.path.rmdir()
        if left:
            logger.warning("%s is not needed any more, but another program keeps %s open; delete "
                           "the folder yourself", self.path, ", ".join(left))

    def _file(self, name: str) -> Path:
        return self.path / f"{name.removesuffix('.weight')}.safetensors"


def _deleted(file: Path) -> bool:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; delete the folder to begin "
                              "again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged; delete the folder to begin again")
    return found
