"""The texts of locales/ from the host's own listing, in the form that ComfyUI's page looks them up.

`python tests/host/locales.py` starts a host, writes locales/en/nodeDefs.json anew and brings
locales/zh/nodeDefs.json into the same order: texts that are kept stay, new ones come in as "",
left-over ones go. What is "" then waits for a translator; test_locales.py fails until it has one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LOCALES = REPOSITORY / "locales"
PACK_NAME = "ComfyUI-PixArt-Delta"

Texts = dict[tuple[str, ...], str]


def our_nodes(object_info: Mapping[str, dict]) -> dict[str, dict]:
    """What the host lists of this pack, whatever the nodes are called."""
    return {name: node for name, node in object_info.items()
            if node.get("python_module") == f"custom_nodes.{PACK_NAME}"}


def inputs_of(sections: Mapping[str, Mapping], prefix: str = "") -> Iterator[tuple[str, dict]]:
    """(dotted name, options) of each input, those behind the choices of a dynamic combo too."""
    for section in ("required", "optional"):
        for name, (_, options) in sections.get(section, {}).items():
            yield prefix + name, options
            for choice in options.get("options") or ():
                if isinstance(choice, dict) and "inputs" in choice:
                    yield from inputs_of(choice["inputs"], f"{prefix}{name}.")


def node_texts(node: Mapping[str, Any]) -> dict:
    """One node as nodeDefs.json has it; the page writes a dot in a name as an underscore."""
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name.replace(".", "_"): {"name": options.get("display_name") or name,
                                            "tooltip": options.get("tooltip") or ""}
                   for name, options in inputs_of(node["input"])},
        "outputs": {str(i): {"name": name, "tooltip": tooltip or ""}
                    for i, (name, tooltip) in enumerate(outputs)},
    }


def english(object_info: Mapping[str, dict]) -> dict[str, dict]:
    """What locales/en/nodeDefs.json must be."""
    return {name: node_texts(node) for name, node in our_nodes(object_info).items()}


def flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Texts:
    """{("PixArtLoader", "inputs", "variant", "tooltip"): text} of a nested nodeDefs."""
    texts: Texts = {}
    for key, value in tree.items():
        texts |= flat(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return texts


def filled(tree: Mapping[str, Any], texts: Texts, path: tuple[str, ...] = ()) -> dict:
    """`tree` with the texts of another language, "" where there is none."""
    return {key: filled(value, texts, (*path, key)) if isinstance(value, Mapping)
            else texts.get((*path, key), "") for key, value in tree.items()}


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Brings every language in locales/ up to the schemas; names what is left to translate."""
    from launch import find_host, running_host

    with tempfile.TemporaryDirectory() as base, \
            running_host(find_host(), Path(base), {PACK_NAME: REPOSITORY}) as host:
        wanted = english(host.object_info())
    old = flat(_read(LOCALES / "en" / "nodeDefs.json"))
    changed = {key for key, text in flat(wanted).items() if old.get(key, text) != text}
    _write(LOCALES / "en" / "nodeDefs.json", wanted)
    for path in sorted(LOCALES.glob("*/nodeDefs.json")):
        if path.parent.name == "en":
            continue
        texts = filled(wanted, flat(_read(path)))
        _write(path, texts)
        for key, text in flat(texts).items():
            if not text or key in changed:
                sys.stdout.write(f"{path.parent.name}: {'look again at' if text else 'translate'} "
                                 f"{'.'.join(key)}\n")


if __name__ == "__main__":
    main()
