"""What a training step of the published recipes costs at full size: time, memory, images a second.

Random weights and data; LCM at batch 12 with gradient checkpointing is PixArt-delta's own setting
(arXiv 2401.05252, table 1: about 32 GB). Run with: python -m benchmarks.training
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import pixart_core as pc
from pixart_core.config import PRESETS
from pixart_core.training.batch import Batch, NullCaption
from pixart_core.training.loop import Progress, train
from pixart_core.training.recipe import Recipe
from pixart_core.training.recipes import RECIPES, recipe_settings

from .measure import GB, command, machine, table, versions

RECIPES_RUN = ("lcm", "lcm-lora", "controlnet", "lora", "base")


class RandomSamples:
    """Latents and captions of one size, the same every time, made once."""

    def __init__(self, size: int, tokens: int, channels: int, control: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latent = torch.randn(1, 4, size // 8, size // 8, generator=generator)
        self.caption = torch.randn(1, tokens, channels, generator=generator)
        self.size, self.control = size, control
        self.null_caption = NullCaption(self.caption[0, :1].clone(), torch.ones(1).bool())

    def check_fit(self, config: pc.PixArtConfig) -> None:
        pass

    def require_control(self) -> None:
        pass

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        first = index * size * world + rank * size
        latents = self.latent.expand(size, -1, -1, -1)
        caption = self.caption.expand(size, -1, -1)
        side = torch.full((size, 2), float(self.size))
        return Batch(tuple(range(first, first + size)), latents, caption,
                     torch.ones(caption.shape[:2]).bool(), side, torch.ones(size, 1),
                     latents if self.control else None, ("",) * size)


class EnoughError(Exception):
    """Ends a run before it writes gigabytes."""


class Rates:
    """The samples a second of every report, and the most memory until then."""

    def __init__(self, steps: int) -> None:
        self.rates: list[float] = []
        self.peak, self.steps = 0, steps

    def progress(self, report: Progress) -> None:
        self.rates.append(report.rate)
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if len(self.rates) == self.steps:
            raise EnoughError

    def message(self, text: str) -> None:
        pass


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="the first two are not counted")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16", "fp16"))
    options = parser.parse_args(argv)

    def cost(recipe: Recipe) -> tuple[str, ...]:
        return _cost(recipe, options.steps)

    rows = run_each(options, cost, steps=options.steps + 1, precision=options.precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine(device), versions(), command(), sep="\n")
    print(described(options, options.precision))
    print(table(("recipe", "batch", "images/s", "peak GB"), rows))


def arguments(doc: str) -> argparse.ArgumentParser:
    """What a benchmark of recipes at full size asks for."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES_RUN), choices=RECIPES_RUN)
    parser.add_argument("--batches", nargs="+", type=int, default=[12])
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--preset", default="alpha-1024", choices=PRESETS)
    parser.add_argument("--depth", type=int, help="fewer blocks, for a first try")
    parser.add_argument("--no-checkpointing", action="store_true")
    return parser


def run_each(options: argparse.Namespace, call: Callable[[Recipe], Sequence[str]], *, steps: int,
             precision: str) -> list[tuple[str, ...]]:
    """The name, the batch and what `call` says of every recipe that was asked for, one by one."""
    config = _config(options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_random_model(path, config)
        for name in options.recipes:
            for batch in options.batches:
                rows.append((name, str(batch), *call(recipe_at_full_size(
                    name, path, config, Path(folder), batch, options.size, steps=steps,
                    precision=precision, checkpointing=not options.no_checkpointing))))
    return rows


def described(options: argparse.Namespace, precision: str) -> str:
    """One line: what was run."""
    return (f"{options.preset}, {_config(options).depth} blocks, {options.size} px, {precision}, "
            f"gradient checkpointing {'off' if options.no_checkpointing else 'on'}")


def _config(options: argparse.Namespace) -> pc.PixArtConfig:
    config = PRESETS[options.preset]
    return config.replace(depth=options.depth) if options.depth else config


def write_random_model(path: Path, config: pc.PixArtConfig) -> None:
    """Write a transformer of random bfloat16 weights."""
    model = pc.PixArtTransformer(config, dtype=torch.bfloat16)
    pc.write_checkpoint(path, model.state_dict(), {"pixart_config": config.to_json()})


def recipe_at_full_size(name: str, path: Path, config: pc.PixArtConfig, folder: Path, batch: int,
                        size: int, *, steps: int, precision: str, checkpointing: bool) -> Recipe:
    """A recipe over random samples of `size` px, from the model at `path`."""
    source = "teacher" if name.startswith("lcm") else "model"
    out = folder / f"{name}-{batch}"
    depth = {"depth": min(13, config.depth - 1)} if name == "controlnet" else {}
    settings = recipe_settings(name, {
        "out": out, "data": out, source: path, "batch_size": batch, "steps": steps,
        "gradient_accumulation": 1, "precision": precision, "log_every": 1,
        "sample_every": 0, "save_every": steps, "gradient_checkpointing": checkpointing, **depth})
    samples = RandomSamples(size, config.max_tokens, config.caption_channels,
                            name == "controlnet")
    return RECIPES[name][0](settings, samples)


def _cost(recipe: Recipe, steps: int) -> tuple[str, ...]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rates = Rates(steps)
    try:
        train(recipe, rates)
    except EnoughError:
        pass
    except torch.OutOfMemoryError:
        return "out of memory", ""
    counted = rates.rates[2:] or rates.rates
    return f"{statistics.median(counted):.3g}", f"{rates.peak / GB:.2f}" if rates.peak else ""


if __name__ == "__main__":
    main()
