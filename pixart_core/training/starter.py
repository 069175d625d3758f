"""A whole model family by one command: scenes, caches and runs in the order of a file of steps."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.read import read_checkpoint
from ..checkpoint.write import write_checkpoint
from ..config import LATENT_SCALE, METADATA_KEY, Variant
from ..load import open_transformer
from .loop import Listener, Outcome, train
from .recipes import RECIPES, make_recipe, recipe_settings
from .settings import read_settings_file

if TYPE_CHECKING:
    from ..vae import VAE

FILE = Path(__file__).resolve().parent / "configs" / "starter.yaml"
_HALF = torch.float16


@dataclass(frozen=True)
class Step:
    """One line of the file: what is done (`scenes`, `cache`, `retarget` or a recipe), under which
    name, with which settings. `{name}` in a setting stands for the folder of an earlier step."""

    name: str
    do: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """The steps, and which of their files go where in the finished folder."""

    steps: tuple[Step, ...]
    files: Mapping[str, str]


def read_family(path: Path = FILE) -> Family:
    """A file of steps. Raises ValueError for what is no such file, naming the step."""
    entries = read_settings_file(path)
    steps: list[Step] = []
    for number, entry in enumerate(entries.get("steps") or [], 1):
        if not isinstance(entry, Mapping) or not {"name", "do"} <= entry.keys():
            raise ValueError(f"{path.name}: step {number} needs a name and what to do")
        settings = {key: value for key, value in entry.items() if key not in ("name", "do")}
        step = Step(str(entry["name"]), str(entry["do"]), settings)
        if step.do not in (*_ACTIONS, *RECIPES):
            raise ValueError(f"{path.name}: step {step.name} is to do {step.do!r}; use one of "
                             f"{', '.join((*_ACTIONS, *RECIPES))}")
        if any(step.name == other.name for other in steps):
            raise ValueError(f"{path.name}: two steps are called {step.name}")
        steps.append(step)
    files = entries.get("files")
    if not steps or not isinstance(files, Mapping) or not files:
        raise ValueError(f"{path.name} has no steps, or no files to hand out")
    return Family(tuple(steps), {str(k): str(v) for k, v in files.items()})


def make_starter(out: Path, work: Path, family: Family | None = None,
                 listener: Listener | None = None) -> Outcome:
    """Run every step of a family below `work`, then put its files, in float16, into `out`.

    A step that is done is not done again, and a run that was stopped goes on, so the same call
    finishes what an earlier one began. With Ctrl-C the outcome says so and `out` stays as it is.
    """
    family = family or read_family()
    work.mkdir(parents=True, exist_ok=True)
    folders = {step.name: work / step.name for step in family.steps}
    for number, step in enumerate(family.steps, 1):
        if listener is not None:
            listener.message(f"{number}/{len(family.steps)} {step.name} ({step.do})")
        settings = _filled(dict(step.settings), folders, step.name)
        if step.do in _ACTIONS:
            _ACTIONS[step.do](folders[step.name], settings)
            continue
        run = recipe_settings(step.do, settings, {"out": folders[step.name]})
        outcome = train(make_recipe(step.do, run), listener)
        if outcome.stopped:
            return outcome
    written = [_hand_out(Path(_filled(source, folders, target)), out / target)
               for target, source in family.files.items()]
    return Outcome(len(family.steps), False, written)


def _filled(value: Any, folders: Mapping[str, Path], name: str) -> Any:
    """A setting with the folders of other steps put in."""
    if isinstance(value, dict):
        return {key: _filled(inner, folders, name) for key, inner in value.items()}
    if not isinstance(value, str) or "{" not in value:
        return value
    try:
        return value.format(**folders)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{name}: {value!r} names a step that is not there: {error}") from error


def _scenes(out: Path, settings: dict[str, Any]) -> None:
    from .scenes import ExportSettings, SceneSettings, export_scenes

    names = ("image_size", "ratios", "two", "counts", "corners")
    own = {name: settings.pop(name) for name in names if name in settings}
    if "ratios" in own:
        own["ratios"] = tuple(own["ratios"])
    export_scenes(out, ExportSettings(scenes=SceneSettings(**own), **settings))


def _cache(out: Path, settings: dict[str, Any]) -> None:
    from ..checkpoint import sha256_file
    from ..text import T5TextEncoder
    from .data import CacheSettings, build_cache

    images, t5, vae = (Path(settings.pop(name)) for name in ("images", "t5", "vae"))
    own = CacheSettings(**settings, t5_sha256=sha256_file(t5), vae_sha256=sha256_file(vae))
    device = torch.device(own.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    build_cache(images, out, own,
                lambda: T5TextEncoder.from_path(t5, dtype=torch.float32, device=device),
                lambda: _fast_vae(vae, own.variant, device))


def _fast_vae(path: Path, variant: Variant, device: torch.device) -> VAE:
    from ..vae import load_vae

    vae = load_vae(path, variant, device=device)
    vae.network.to(memory_format=torch.channels_last)  # a third faster on the CPU
    return vae


def _retarget(out: Path, settings: dict[str, Any]) -> None:
    """The same weights for the other variant, size or VAE scale: what training goes on from.

    A transformer's config gets the `fields`, and embedders that it has no use for then are left
    out; a VAE gets the `vae_scale` under which hosts see the same latents.
    """
    source = Path(settings["source"])
    out.mkdir(parents=True, exist_ok=True)
    target = out / source.name
    if "vae_scale" in settings:
        tensors = dict(read_checkpoint(source).state_dict)
        tensors["vae_scale"] = torch.tensor(float(settings["vae_scale"]))
        write_checkpoint(target, tensors, {})
        return
    weights, config = open_transformer(source)
    config = config.replace(**settings["fields"])
    if not config.micro_conditioning:
        weights = {name: tensor for name, tensor in weights.items()
                   if not name.startswith(("csize_embedder.", "ar_embedder."))}
    write_checkpoint(target, weights, {METADATA_KEY: config.to_json()})


def _recache(out: Path, settings: dict[str, Any]) -> None:
    """A cache for the other variant whose VAE has the same latents, `vae_scale` apart.

    Nothing is encoded again: the shards are those of `source`. Raises ValueError for VAEs that
    differ in more than their scale.
    """
    from ..checkpoint import sha256_file
    from .data.index import INDEX_NAME, read_index

    source = Path(settings["source"])
    old, new = (dict(read_checkpoint(settings[name]).state_dict) for name in ("old_vae", "vae"))
    for tensors in (old, new):
        tensors.pop("vae_scale", None)
    if old.keys() != new.keys() or not all(torch.equal(old[name], new[name]) for name in old):
        raise ValueError(f"{settings['old_vae']} and {settings['vae']} are different VAEs: a cache "
                         "of one is none of the other")
    index = read_index(source)
    index.facts = dataclasses.replace(
        index.facts, variant=settings["variant"], latent_scale=LATENT_SCALE[settings["variant"]],
        vae_sha256=sha256_file(Path(settings["vae"])))
    out.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.safetensors"):
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    (out / INDEX_NAME).unlink(missing_ok=True)
    index.write(out)


_ACTIONS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "scenes": _scenes, "cache": _cache, "retarget": _retarget, "recache": _recache,
}


def _hand_out(source: Path, target: Path) -> Path:
    """A file or folder of a step where the family wants it, weights in float16."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            _hand_out(file, target / file.name)
    elif source.suffix == ".safetensors":
        checkpoint = read_checkpoint(source)
        write_checkpoint(target, {name: _halved(name, tensor)
                                  for name, tensor in checkpoint.state_dict.items()},
                         checkpoint.metadata)
    else:
        shutil.copyfile(source, target)
    return target


def _halved(name: str, tensor: Tensor) -> Tensor:
    exact = name in ("vae_scale", "vae_shift", "norm")  # scales, and a mean in 0..255
    return tensor.to(_HALF) if tensor.dtype == torch.float32 and not exact else tensor
