"""Run every template in a real ComfyUI; write its API-format twin and its thumbnail.

`python -m benchmarks.thumbnails --comfyui PATH`, after a template in workflows/ was changed.
workflows/api/NAME.json is what the web page would queue for workflows/NAME.json, and
workflows/NAME.jpg is the picture that it makes, enlarged.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from .host_server import (
    REPOSITORY,
    Host,
    add_comfyui_option,
    find_installation,
    load,
    started,
    to_api,
)

TEMPLATES = REPOSITORY / "workflows"
SIDE = 400
MAX_BYTES = 30_000
EXAMPLE = "example.png"  # in the input folder of every ComfyUI


def write_api(template: Path, object_info: Mapping[str, dict]) -> dict[str, dict]:
    """Writes the API file of a template; returns its prompt."""
    prompt = to_api(load(template), object_info)
    target = template.parent / "api" / template.name
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return prompt


def draw(host: Host, prompt: Mapping[str, dict]) -> Image.Image:
    """The one picture that a prompt saves."""
    [saved] = host.run(prompt).images("SaveImage")
    return host.picture(saved)


def write_thumbnail(picture: Image.Image, target: Path) -> int:
    """Writes `picture` as a JPG of 400 px below 30 kB; returns its quality."""
    scale = SIDE / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    large = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    for quality in range(90, 20, -5):
        large.save(target, quality=quality, optimize=True)
        if target.stat().st_size < MAX_BYTES:
            return quality
    raise ValueError(f"{target.name} does not fit into {MAX_BYTES} bytes at any quality")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thumbnails", description=__doc__)
    add_comfyui_option(parser)
    parser.add_argument("names", nargs="*", help="templates without .json; default all")
    options = parser.parse_args(arguments)
    installation = find_installation(parser, options.comfyui)
    paths = [TEMPLATES / f"{name}.json" for name in options.names]
    with started(installation) as host:
        host.upload(Image.open(installation.path / "input" / EXAMPLE), EXAMPLE)
        object_info = host.object_info()
        for path in paths or sorted(TEMPLATES.glob("*.json")):
            picture = draw(host, write_api(path, object_info))
            quality = write_thumbnail(picture, path.with_suffix(".jpg"))
            print(f"{path.stem:36} {picture.width} x {picture.height}, JPG quality {quality}")


if __name__ == "__main__":
    main()
