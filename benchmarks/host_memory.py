"""Memory of a whole 1024-px picture in a real ComfyUI on a GPU, for each recipe of small cards.

`python -m benchmarks.host_memory --comfyui PATH --folder DIR` writes models of full size with
random weights (T5-XXL, PixArt-delta XL/2 in 16 bits and in SVDQuant, SD's VAE; 12 GB), starts the
server for each of the templates `PixArt 8 GB`, `6 GB` and `4 GB` and one with T5 on the CPU, has it
leave free what the larger card has more than the recipe's, queues the template at 1024 px, and asks
every few milliseconds how much of the card is taken. It fails where a recipe takes more than it
promises. `--starter` runs the same on the starter's small files, to see that it works; without a
card the numbers are of main memory and mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.quant import StoredWeight, file_tensors
from pixart_core.quant.policy import METHODS, transformer_layers
from pixart_core.starter import find_starter

from .contenders import random_weights
from .host_server import (
    REPOSITORY,
    Host,
    add_comfyui_option,
    find_installation,
    load,
    started,
)
from .measure import GB, command, table
from .small_memory import KL, T5_XXL, placeholder
from .t5_precision import write_random_t5

API = REPOSITORY / "workflows" / "api"
MODEL = "random_lcm.safetensors"
SVDQUANT = "random_svdquant.safetensors"
T5 = "random_t5.safetensors"
VAE = "random_vae.safetensors"
PIXELS = 1024
HOSTS_OWN = 0.4  # GiB that the host keeps free by itself; --reserve-vram stands in its place
_TOTAL = "import torch; print(torch.cuda.mem_get_info()[1])"
RUN_SECONDS = 3600  # T5-XXL is read from disk, and in one recipe runs on the CPU


class Recipe(NamedTuple):
    """A template in API format, inputs to change by node type, the gigabytes of the card that it is
    for, and those it may take."""

    template: str
    changes: Mapping[str, Mapping[str, Any]]
    card: float
    limit: float


RECIPES = {
    "8 GB: T5 int8": Recipe("PixArt 8 GB", {}, 8.0, 7.0),
    "6 GB: T5 int4, VAE in tiles": Recipe("PixArt 6 GB", {}, 6.0, 4.0),
    "4 GB: T5 int4, SVDQuant, VAE in tiles": Recipe("PixArt 4 GB", {}, 4.0, 3.7),
    "T5 on the CPU, SVDQuant, VAE in tiles": Recipe(
        "PixArt 4 GB", {"PixArtT5Loader": {"device": "cpu", "text_cache": False}}, 4.0, 3.0),
}


class Memory(NamedTuple):
    """Bytes: what the whole card had in use, CUDA's own included; what torch had reserved; what was
    in tensors."""

    used: int
    reserved: int
    allocated: int


class Watch(threading.Thread):
    """Asks a server for its memory until it is told to stop; `most` is the largest of each."""

    def __init__(self, host: Host, seconds: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.host, self.seconds = host, seconds
        self.most = memory_now(host)
        self.asked = 1
        self.failed: Exception | None = None
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self.seconds):
            try:
                self.most = Memory(*map(max, self.most, memory_now(self.host)))
            except Exception as reason:
                self.failed = reason
                return
            self.asked += 1

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self.join()
        if self.failed and kind is None:
            raise RuntimeError("the server stopped answering while it was watched, so that its "
                               "peak is not known") from self.failed
        self.most = Memory(*map(max, self.most, memory_now(self.host)))


def memory_now(host: Host) -> Memory:
    """What the first device of a server says of itself."""
    device = host.get("/system_stats")["devices"][0]
    reserved, unused = device["torch_vram_total"], device["torch_vram_free"]
    # what the host calls free has in it what torch keeps and does not use
    return Memory(device["vram_total"] - device["vram_free"] + unused, reserved,
                  reserved - unused)


def measure(host: Host, recipe: Recipe, names: Mapping[str, str], pixels: int) -> Watch:
    """Run a recipe on a server that has loaded nothing; what it took at most.

    `names` has the file for each loader's node type; the transformer of a template in SVDQuant is
    under "SVDQuant".
    """
    with Watch(host) as watch:
        host.run(prompt_of(recipe, names, pixels), timeout=RUN_SECONDS)
    return watch


def prompt_of(recipe: Recipe, names: Mapping[str, str], pixels: int) -> dict[str, Any]:
    """The template with other files and another size."""
    prompt = copy.deepcopy(load(API / f"{recipe.template}.json"))
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "PixArtLoader":
            inputs["model_name"] = names["SVDQuant" if "svdquant" in inputs["model_name"]
                                         else kind]
        elif kind == "PixArtT5Loader":
            inputs["t5_name"] = names[kind]
        elif kind == "VAELoader":
            inputs["vae_name"] = names[kind]
        elif kind == "EmptyLatentImage":
            inputs.update(width=pixels, height=pixels)
        inputs.update(recipe.changes.get(kind, {}))
    return prompt


def write_files(folder: Path) -> dict[str, str]:
    """Models of full size with random weights in ComfyUI's folders below `folder`; their names.

    Where all four are there they stay.
    """
    models, texts, vaes = (folder / name for name in ("diffusion_models", "text_encoders", "vae"))
    for path in (models, texts, vaes):
        path.mkdir(parents=True, exist_ok=True)
    found = {"PixArtLoader": MODEL, "SVDQuant": SVDQUANT, "PixArtT5Loader": T5, "VAELoader": VAE}
    if all(path.exists() for path in (models / MODEL, models / SVDQUANT, texts / T5, vaes / VAE)):
        return found
    config = pc.PRESETS["delta-1024-lcm"]
    weights = {name: w.half() for name, w in random_weights(config).items()}
    said = {METADATA_KEY: config.to_json()}
    pc.write_checkpoint(models / MODEL, weights, said)
    names = transformer_layers({n: w.shape for n, w in weights.items()}, METHODS["svdquant"])
    packed = {name: filled(placeholder("svdquant", weights.pop(name).shape)) for name in names}
    pc.write_checkpoint(models / SVDQUANT, {**weights, **file_tensors(packed)}, said)
    write_random_t5(texts / T5, T5_XXL)
    write_vae(vaes / VAE)
    return found


def filled(weight: StoredWeight) -> StoredWeight:
    """A placeholder with random numbers in it."""
    generator = torch.Generator().manual_seed(0)

    def numbers(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return torch.randint(-128, 128, t.shape, generator=generator).to(t.dtype)
        return (torch.rand(t.shape, generator=generator) * 0.02).to(torch.float16)

    return StoredWeight(weight.format, {n: numbers(t) for n, t in weight.tensors.items()})


def write_vae(path: Path) -> None:
    """SD's VAE with random weights, as diffusers names them, which ComfyUI reads too."""
    import diffusers

    network = diffusers.AutoencoderKL(**KL).half()
    pc.write_checkpoint(path, network.state_dict(), {})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_memory",
                                     description=__doc__.split("\n\n")[0])
    add_comfyui_option(parser)
    parser.add_argument("--folder", type=Path, help="for the models; kept, and used again")
    parser.add_argument("--starter", action="store_true", help="the starter's small files")
    parser.add_argument("--cpu", action="store_true", help="start the server without a GPU")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    installation = find_installation(parser, options.comfyui)
    if not options.starter and options.folder is None:
        parser.error("--folder is missing; models of full size take 12 GB there")
    names = starter_names() if options.starter else write_files(options.folder)
    pixels = options.pixels or (find_starter().image_size if options.starter else PIXELS)
    total = None if options.cpu else card_memory()
    if total is None and not options.cpu:
        parser.error("this Python sees no GPU; --cpu runs without one, and its numbers are of main "
                     "memory")
    judged = not (options.starter or options.cpu)
    rows, result, good = [], {}, True
    for name, recipe in RECIPES.items():
        with started(installation, server_arguments(total, recipe)) as host:
            if not options.starter:
                link_models(options.folder, host.models_dir)
            empty = memory_now(host)
            watch = measure(host, recipe, names, pixels)
            device = host.get("/system_stats")["devices"][0]["name"]
        most = watch.most
        kept = not judged or most.used / GB < recipe.limit
        good = good and kept
        result[name] = most._asdict()
        rows.append([name, *(f"{n / GB:.2f}" for n in (empty.used, *most)), recipe.limit,
                     watch.asked, ("yes" if kept else "NO") if judged else "not judged"])
    print(f"{device}, {installation.version}, {pixels} px.\n\nCommand: `{command()}`\n\n" + table(
        ["recipe", "before, GB", "used, GB", "reserved by torch, GB", "in tensors, GB", "limit, GB",
         "times asked", "within it"], rows))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    if not good:
        raise SystemExit("a recipe takes more memory than it promises")


def card_memory() -> int | None:
    """Bytes of the first card, or None; asked by another process, which leaves nothing on it."""
    found = subprocess.run([sys.executable, "-c", _TOTAL], capture_output=True, text=True,
                           check=False)
    return int(found.stdout) if found.returncode == 0 else None


def server_arguments(total: int | None, recipe: Recipe) -> list[str]:
    """What makes a card of `total` bytes as small as the recipe's; None is no card."""
    if total is None:
        return ["--cpu"]
    more = (total - recipe.card * GB) / 2**30 + HOSTS_OWN
    return ["--reserve-vram", f"{more:.2f}"] if more > HOSTS_OWN else []


def starter_names() -> dict[str, str]:
    starter = find_starter()
    return {"PixArtLoader": starter.lcm.name, "SVDQuant": starter.lcm_svdquant.name,
            "PixArtT5Loader": starter.t5_file.name, "VAELoader": starter.vae.name}


def link_models(folder: Path, models: Path) -> None:
    """Put the files of `folder` where the server looks, without copying where that can be."""
    for file in folder.glob("*/*.safetensors"):
        target = models / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, target)


if __name__ == "__main__":
    main()
