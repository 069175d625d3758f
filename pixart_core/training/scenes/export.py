"""A scene set as a folder: pictures, captions, what was drawn, and outlines to steer by.

    OUT/images/000000.png ...   OUT/outlines/000000.png ... (with outlines)
    OUT/scenes.json             the settings, written first
    OUT/captions.jsonl          one line per picture, written last: with it the set is whole
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...extras import require
from ...whole import whole_file
from ..draws import mix_seed
from .captions import caption_naming, captions, check_attributes
from .draw import SceneSettings, Split, draw_scene
from .render import color_shifts, outline, render
from .scene import Scene

VERSION = 3  # of what a seed draws and says
_CHUNK = 256
_SPLITS = ("train", "held_out", "all")


@dataclass(frozen=True)
class ExportSettings:
    """What a folder holds.

    Attributes:
        count: pictures; more of them leave the first ones as they are.
        seed: another seed, other scenes.
        scenes: kinds and sizes.
        split: "train", "held_out", or "all" attribute combinations.
        phrasings: captions of every picture; the first one names everything.
        jitter: colours move by up to this many 255ths.
        outlines: write the outline of every picture too, to train a ControlNet on.
        named: attributes that captions name beside shapes and their count, in every picture the
            same: for a ControlNet, colours alone, so that outlines have to say the rest. None
            leaves some out at random.
    """

    count: int
    seed: int = 0
    scenes: SceneSettings = field(default_factory=SceneSettings)
    split: Split = "train"
    phrasings: int = 4
    jitter: float = 2.0
    outlines: bool = False
    named: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("count", "phrasings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.split not in _SPLITS:
            raise ValueError(f"split is {self.split!r}; use one of {', '.join(_SPLITS)}")
        check_attributes("named is", self.named or ())
        if self.jitter < 0:
            raise ValueError(f"jitter is {self.jitter}; use 0 or more")


def export_scenes(out: str | Path, settings: ExportSettings,
                  progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the scene set of `settings` into the folder `out`; returns its captions.jsonl.

    An interrupted export of the same settings goes on where it was; a whole one is left as it is.
    `progress(done, count)` follows every chunk. Raises ValueError when `out` holds anything else.
    """
    require("PIL", "writing pictures")
    out = Path(out)
    lines = out / "captions.jsonl"
    wanted = {"version": VERSION, **json.loads(json.dumps(dataclasses.asdict(settings)))}
    if _settings_of(out) != wanted:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already and holds something else than this scene "
                             "set; name another folder")
        (out / "images").mkdir(parents=True, exist_ok=True)
        _write(out / "scenes.json", json.dumps(wanted, indent=2).encode())
    if lines.is_file():
        return lines
    (out / "images").mkdir(exist_ok=True)
    if settings.outlines:
        (out / "outlines").mkdir(exist_ok=True)
    entries = []
    for numbers, scenes in _chunks(settings):
        _write_pictures(out, numbers, scenes, settings)
        entries += [_entry(number, scene, settings)
                    for number, scene in zip(numbers, scenes, strict=True)]
        if progress is not None:
            progress(len(entries), settings.count)
    _write(lines, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    return lines


def _settings_of(out: Path) -> Any:
    """What the set in `out` was made of."""
    try:
        return json.loads((out / "scenes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _chunks(settings: ExportSettings) -> Iterator[tuple[list[int], list[Scene]]]:
    for start in range(0, settings.count, _CHUNK):
        numbers = list(range(start, min(start + _CHUNK, settings.count)))
        yield numbers, [draw_scene(settings.seed, n, settings.scenes, settings.split)
                        for n in numbers]


def _entry(number: int, scene: Scene, settings: ExportSettings) -> dict[str, Any]:
    if settings.named is None:
        said = captions(scene, settings.seed, number, settings.phrasings)
    else:
        said = [caption_naming(scene, settings.named, mix_seed(settings.seed, i), number)
                for i in range(settings.phrasings)]
    entry: dict[str, Any] = {"file_name": f"images/{number:06d}.png",
                             "text": [caption.text for caption in said],
                             "scene": scene.to_dict()}
    if settings.outlines:
        entry["control"] = f"outlines/{number:06d}.png"
    return entry


def _write_pictures(out: Path, numbers: list[int], scenes: list[Scene],
                    settings: ExportSettings) -> None:
    """The pictures (and outlines) that are not there yet."""
    missing: dict[tuple[int, int], list[int]] = {}
    for i, (number, scene) in enumerate(zip(numbers, scenes, strict=True)):
        there = (out / "images" / f"{number:06d}.png").is_file()
        if settings.outlines:
            there &= (out / "outlines" / f"{number:06d}.png").is_file()
        if not there:
            missing.setdefault((scene.width, scene.height), []).append(i)
    for rows in missing.values():
        chosen = [scenes[i] for i in rows]
        shift = color_shifts([mix_seed(settings.seed, numbers[i]) for i in rows], settings.jitter)
        _save(render(chosen, shift), out / "images", [numbers[i] for i in rows])
        if settings.outlines:
            _save(outline(chosen), out / "outlines", [numbers[i] for i in rows])


def _save(pictures: Tensor, folder: Path, numbers: list[int]) -> None:
    """(N, 3 or 1, H, W) in 0..1 as PNG files, each whole or not there."""
    from PIL import Image

    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for number, picture in zip(numbers, pixels, strict=True):
        path = folder / f"{number:06d}.png"
        image = Image.fromarray(picture if picture.shape[-1] == 3 else picture[..., 0])
        with whole_file(path, sync=False) as temporary:
            image.save(temporary, format="PNG", compress_level=1)


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
