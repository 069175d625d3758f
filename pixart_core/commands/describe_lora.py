"""The rows of `pixart inspect` for a LoRA: its layers, how strong they are, what is not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint import CheckpointError
from ..checkpoint.lora import read_lora
from ..checkpoint.lora_layer import LoRALayer
from .rows import Row, as_text, shorten

NOT_USABLE = "cannot be used"
_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "diff": "difference",
          "value": "replaced value"}


def describe_lora(path: Path) -> list[Row]:
    """What `read_lora` finds in a file or folder; one row NOT_USABLE with its reason where it
    refuses."""
    try:
        lora = read_lora(path)
    except CheckpointError as error:
        return [Row(NOT_USABLE, str(error))]
    scaled = [layer for layer in lora.layers if layer.alpha_from]
    dora = sum(layer.magnitude is not None for layer in lora.layers)
    ranks = Counter(layer.rank for layer in lora.layers if layer.rank is not None)
    rows = [Row("layers", f"{len(lora.layers)}: " + _counted(
                (_KINDS[layer.kind] for layer in lora.layers), "{} {}"), "tensor names"),
            Row("rank", _counted(ranks.elements(), "{1} ({0} layers)") or "no low-rank pairs",
                "shapes")]
    for origin in dict.fromkeys(layer.alpha_from for layer in scaled):
        rows.append(Row("scale", _range([la for la in scaled if la.alpha_from == origin]), origin))
    rows += [Row("rsLoRA", as_text(lora.rslora), "PEFT's config"),
             Row("DoRA", f"{dora} layers" if dora else "no", "tensor names")]
    rows += [Row("note", note) for note in lora.notes]
    if lora.unused:
        rows.append(Row("not used", shorten(f"{len(lora.unused)} tensors: "
                                            + ", ".join(lora.unused)), "tensor names"))
    return rows


def _counted(items: Iterable[object], form: str) -> str:
    return ", ".join(form.format(count, item) for item, count in Counter(items).most_common())


def _range(layers: list[LoRALayer]) -> str:
    low, high = (pick(layer.scale for layer in layers) for pick in (min, max))
    values = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"{values} ({len(layers)} layers)"
