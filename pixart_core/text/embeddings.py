"""Encoded prompts in a file, so that a machine without room for T5 can draw from them.

The file is safetensors. Its header has the entry `pixart_embeddings`, a JSON object: `format` (1),
`info` (the prompt and how it was encoded, for people) and `entries`, one for each conditioning:
`options` (numbers, text and tuples that go along with it: width, height, aspect_ratio, ...) and
`tensors` (the names of further tensors, such as area masks). The tensors of entry i are `i.caption`
(B, L, D), `i.caption_mask` (B, L) where there is padding, and `i.<name>` for the further ones.
ComfyUI's CONDITIONING is such a list of entries; the command line writes one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.read import SAFETENSORS_SUFFIXES, CheckpointError, read_checkpoint
from ..checkpoint.write import write_checkpoint

EMBEDDINGS_KEY = "pixart_embeddings"
FORMAT = 1

_CAPTION, _MASK = "caption", "caption_mask"
_SIZES = ("width", "height", "aspect_ratio")
_SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class CaptionEntry:
    """Caption states (B, L, D), their mask (B, L) where some are padding, and what goes along."""

    caption: Tensor
    mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def check(self, source: str) -> None:
        """Raise CheckpointError unless these are finite states and a mask of their shape."""
        shape = tuple(self.caption.shape)
        if len(shape) != 3 or not all(shape) or not self.caption.is_floating_point():
            raise CheckpointError(f"{source}: the caption has shape {shape} and is "
                                  f"{self.caption.dtype}; floating (captions, tokens, width) was "
                                  "expected")
        if self.mask is not None and tuple(self.mask.shape) != shape[:2]:
            raise CheckpointError(f"{source}: the mask has shape {tuple(self.mask.shape)}, the "
                                  f"caption {shape}; {shape[:2]} was expected")
        if not self.caption.float().isfinite().all():
            raise CheckpointError(f"{source}: the caption holds NaN or infinite values; encode the "
                                  "prompt again, with a T5 file in bfloat16 or float32")


class CaptionRow(NamedTuple):
    """One caption without padding, states (L, D), and the size told beside it, if any."""

    states: Tensor
    size: tuple[float, float] | None = None  # height, width in pixels
    aspect_ratio: float | None = None  # height over width


def save_embeddings(path: str | Path, entries: Sequence[CaptionEntry], info: Mapping[str, Any],
                    metadata: Mapping[str, str] | None = None) -> None:
    """Write captions to a safetensors file, whole or not at all, replacing one that is there.

    `info` is told to people (JSON values); `metadata` are further header entries.

    Raises ValueError for options that a file cannot hold, CheckpointError for captions that no
    model could use and for folders that cannot be written.
    """
    name = Path(path).name
    if not entries:
        raise ValueError(f"{name}: there is no caption to save")
    tensors: dict[str, Tensor] = {}
    table = []
    for i, entry in enumerate(entries):
        entry.check(name)
        own = {_CAPTION: entry.caption, **({} if entry.mask is None else {_MASK: entry.mask})}
        tensors |= {f"{i}.{key}": tensor for key, tensor in {**entry.tensors, **own}.items()}
        table.append({"tensors": sorted(entry.tensors), "options": _plain(entry.options, name)})
    described = {"format": FORMAT, "info": dict(info), "entries": table}
    header = {**(metadata or {}), EMBEDDINGS_KEY: json.dumps(described)}
    write_checkpoint(path, tensors, header)


def load_embeddings(path: str | Path) -> tuple[list[CaptionEntry], dict[str, Any]]:
    """The captions of a file that `save_embeddings` wrote, bit for bit, and its info.

    Raises CheckpointError for everything else.
    """
    path = Path(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES and path.exists():
        raise CheckpointError(f"{path.name} is no .safetensors file, and captions are saved as "
                              "nothing else; choose a file from PixArt Save Embeddings or `pixart "
                              "encode`")
    checkpoint = read_checkpoint(path)
    if EMBEDDINGS_KEY not in checkpoint.metadata:
        raise CheckpointError(f"{path.name} holds no encoded prompt (its header has no "
                              f"{EMBEDDINGS_KEY!r}); choose a file from PixArt Save Embeddings or "
                              "`pixart encode`")
    try:
        described = json.loads(checkpoint.metadata[EMBEDDINGS_KEY])
        if described["format"] != FORMAT:
            raise CheckpointError(f"{path.name} has format {described['format']!r} of encoded "
                                  f"prompts; this version reads {FORMAT}: update it, or encode the "
                                  "prompt again")
        entries = [_entry(i, row, checkpoint.state_dict)
                   for i, row in enumerate(described["entries"])]
        info = dict(described["info"])
        known = {name for i, row in enumerate(described["entries"])
                 for name in (f"{i}.{_CAPTION}", f"{i}.{_MASK}",
                              *(f"{i}.{tensor}" for tensor in row["tensors"]))}
        if not known >= checkpoint.state_dict.keys():
            raise KeyError(min(checkpoint.state_dict.keys() - known))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged: its {EMBEDDINGS_KEY!r} header does not "
                              f"describe its tensors ({type(error).__name__}: {error})") from error
    if not entries:
        raise CheckpointError(f"{path.name} holds no caption")
    for entry in entries:
        entry.check(path.name)
    return entries, info


def caption_rows(entries: Sequence[CaptionEntry], source: str) -> list[CaptionRow]:
    """One row for each caption of a file, as a pipeline draws them: without their padding.

    Raises ValueError for what only ComfyUI can follow: several entries at once, areas, masks,
    ranges of steps.
    """
    if len(entries) != 1:
        raise ValueError(f"{source} combines {len(entries)} conditionings; load it in ComfyUI, or "
                         "save each by itself")
    entry, = entries
    foreign = [*entry.tensors, *(name for name, value in entry.options.items()
                                 if name not in _SIZES and value is not None)]
    if foreign:
        raise ValueError(f"{source} holds {', '.join(foreign)} beside the caption, which only "
                         "ComfyUI follows; load it there, or save the conditioning without")
    options = entry.options
    size = (options["height"], options["width"]) if "width" in options else None
    masks = [None] * len(entry.caption) if entry.mask is None else entry.mask.bool()
    return [CaptionRow(states if mask is None else states[mask], size, options.get("aspect_ratio"))
            for states, mask in zip(entry.caption, masks, strict=True)]


def stack_rows(rows: Sequence[CaptionRow], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Caption states (B, L, D) of all rows, padded to the longest, and a mask (B, L) if any is."""
    lengths = [len(row.states) for row in rows]
    longest = max(lengths)
    states = torch.stack([F.pad(row.states.to(device), (0, 0, 0, longest - length))
                          for row, length in zip(rows, lengths, strict=True)])
    if min(lengths) == longest:
        return states, None
    steps = torch.arange(longest, device=device)
    return states, steps < torch.tensor(lengths, device=device)[:, None]


def _plain(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Options as JSON; tuples become lists, which `_entry` turns back."""
    for name, value in options.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, _SCALARS) for part in parts):
            raise ValueError(f"{source}: {name!r} of the conditioning ({type(value).__name__}) "
                             "cannot be kept in a file; save the conditioning before the node that "
                             "adds it, and add it after loading")
    return {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}


def _entry(i: int, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CaptionEntry:
    mask = tensors.get(f"{i}.{_MASK}")
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in row["options"].items()}
    # copies: what is mapped would hold on to the file
    return CaptionEntry(tensors[f"{i}.{_CAPTION}"].clone(), None if mask is None else mask.clone(),
                        options, {name: tensors[f"{i}.{name}"].clone() for name in row["tensors"]})
