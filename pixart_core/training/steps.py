"""What a family of models is made of beside training runs: scenes, caches, models made over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.write import write_checkpoint
from ..config import METADATA_KEY
from ..load import load_transformer, open_transformer

_CALIBRATION_SEED = 7  # of captions that no training run sees


def _scenes(out: Path, settings: dict[str, Any]) -> None:
    from .scenes import ExportSettings, SceneSettings, export_scenes

    names = ("image_size", "ratios", "two", "counts", "corners", "spread", "grid")
    settings = {name: tuple(value) if isinstance(value, list) else value
                for name, value in settings.items()}
    own = {name: settings.pop(name) for name in names if name in settings}
    export_scenes(out, ExportSettings(scenes=SceneSettings(**own), **settings))


def _cache(out: Path, settings: dict[str, Any]) -> None:
    from ..checkpoint import sha256_file
    from ..text import T5TextEncoder
    from ..vae import load_vae
    from .data import CacheSettings, build_cache

    images, t5, vae = (Path(settings.pop(name)) for name in ("images", "t5", "vae"))
    own = CacheSettings(**settings, t5_sha256=sha256_file(t5), vae_sha256=sha256_file(vae))
    device = torch.device(own.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    build_cache(images, out, own,
                lambda: T5TextEncoder.from_path(t5, dtype=torch.float32, device=device),
                lambda: load_vae(vae, own.variant, device=device))


def _rescale(out: Path, settings: dict[str, Any]) -> None:
    """A cache for the other variant on the same VAE: its latents under the other factor."""
    from .data import rescale_cache

    rescale_cache(Path(settings["source"]), out, settings["variant"])


def _retarget(out: Path, settings: dict[str, Any]) -> None:
    """The same weights under other config `fields`, which training goes on from.

    Embedders that the new config has no use for are left out.
    """
    source = Path(settings["source"])
    out.mkdir(parents=True, exist_ok=True)
    weights, config = open_transformer(source)
    config = config.replace(**settings["fields"])
    if not config.micro_conditioning:
        weights = {name: tensor for name, tensor in weights.items()
                   if not name.startswith(("csize_embedder.", "ar_embedder."))}
    write_checkpoint(out / source.name, weights, {METADATA_KEY: config.to_json()})


def _svdquant(out: Path, settings: dict[str, Any]) -> None:
    """A model in SVDQuant 4-bit, solved for what it sees while it draws captions of scenes.

    `source` and `t5` are files; `image_size` and `count` say what is drawn, `rank`, `rows` and
    `seed` how it is solved. A file that is there is kept.
    """
    from ..checkpoint import sha256_file
    from ..quant.policy import METHODS
    from ..quant.svdquant import SVDQuantSettings
    from ..quantize.calibrated import (
        described,
        encode_captions,
        observed_rows,
        solve_calibrated,
    )
    from ..quantize.network import open_network, write_network
    from ..quantize.work import WorkFolder
    from ..settings import Settings
    from .scenes import SceneSettings, draw_scenes, full_caption

    source, target = Path(settings["source"]), out / Path(settings["source"]).name
    if target.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    size, count, seed, rows = (int(settings[name])
                               for name in ("image_size", "count", "seed", "rows"))
    scenes = draw_scenes(_CALIBRATION_SEED, range(count), SceneSettings(size))
    prompts = [full_caption(scene, _CALIBRATION_SEED, number)
               for number, scene in enumerate(scenes)]
    network = open_network(source, "pixart", {})
    names = network.layers(METHODS["svdquant"])
    drawn = Settings("", height=size, width=size, seed=seed).resolve(network.config)
    solver = SVDQuantSettings(rank=int(settings["rank"]), seed=seed, dtype=torch.float16)

    def observe() -> dict[str, torch.Tensor]:
        encoded = encode_captions(Path(settings["t5"]), prompts, drawn,
                                  network.config.caption_channels)
        model = load_transformer(source, dtype=torch.float32)
        return observed_rows(model, model, names, rows, drawn, encoded)

    said = described(solver, drawn, count, rows, torch.float32)
    work = WorkFolder(target)
    work.begin({**said, "source": sha256_file(source)})
    solved = solve_calibrated(network, names, solver, work, observe)
    write_network(target, network, solved.stored, torch.float16, said, solved.biases)
    work.finish()


ACTIONS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "scenes": _scenes, "cache": _cache, "retarget": _retarget, "rescale": _rescale,
    "svdquant": _svdquant,
}
