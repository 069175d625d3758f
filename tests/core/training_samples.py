"""What tests of training share: random samples in memory, a tiny model, small recipes on both."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

import pixart_core as pc
from pixart_core.training.batch import Batch, NullCaption
from pixart_core.training.curves import read_curves
from pixart_core.training.prior import PriorSamples
from pixart_core.training.recipes import RECIPES, recipe_settings

SMALL = {"hidden_size": 16, "depth": 3, "num_heads": 2, "mlp_hidden_size": 32,
         "caption_channels": 24, "max_tokens": 5}
DENOISERS = ("base", "lcm", "lcm-lora", "controlnet", "lora")
QUICK = {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2, "log_every": 1,
         "sample_every": 0, "precision": "no", "gradient_checkpointing": False,
         "max_grad_norm": 1.0}


class MemorySamples:
    """`count` random samples of one size, in order, over and over."""

    def __init__(self, count=16, size=(8, 6), tokens=5, channels=24, control=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(count, 4, *size, generator=g)
        self.caption = torch.randn(count, tokens, channels, generator=g)
        self.mask = torch.arange(tokens)[None] <= torch.arange(count)[:, None] % tokens
        self.caption *= self.mask[..., None]
        self.control = torch.randn(count, 4, *size, generator=g) if control else None
        states = torch.randn(2, channels, generator=g)
        self.null_caption = NullCaption(states, torch.tensor([True, False]))

    def check_fit(self, config):
        pass

    def require_control(self):
        assert self.control is not None

    def batch(self, index, size, rank=0, world=1):
        first = index * size * world + rank * size
        return self._rows(range(first, first + size))

    def preview(self, count):
        return self._rows(range(count))

    def _rows(self, numbers):
        rows = [n % len(self.latents) for n in numbers]
        h, w = (8 * n for n in self.latents.shape[-2:])
        sizes = torch.tensor([[h, w]] * len(rows)).float()
        control = None if self.control is None else self.control[rows]
        return Batch(tuple(numbers), self.latents[rows], self.caption[rows], self.mask[rows],
                     sizes, sizes[:, :1] / sizes[:, 1:], control, tuple(str(r) for r in rows))


def class_pictures():
    """Five samples of a subject, and seven of its class in another shape."""
    return PriorSamples(MemorySamples(count=5), MemorySamples(count=7, size=(6, 8), seed=1))


def write_model(path, **fields):
    """A checkpoint of random weights, none of them zero; its path."""
    config = pc.PixArtConfig(**SMALL | fields)
    net = pc.PixArtTransformer(config)
    g = torch.Generator().manual_seed(3)
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.data = 0.2 * torch.randn(tensor.shape, generator=g)
    pc.write_checkpoint(path, net.state_dict(), {"pixart_config": config.to_json()})
    return path


def start(name, out, model, samples=None, **changes):
    """A small recipe on samples in memory, ready for `train`."""
    own = {"teacher": model} if name.startswith("lcm") else {"model": model}
    if name == "lcm-lora" or name == "lora":
        own["rank"] = 2
    if name == "controlnet":
        own["depth"] = 2
    if name.startswith("lcm"):
        own["teacher_dtype"] = "float32"
    settings = recipe_settings(name, QUICK | own | {"out": out, "data": out} | changes)
    if samples is None:
        samples = class_pictures() if "class_data" in changes else MemorySamples(control=True)
    return RECIPES[name][0](settings, samples)


def losses(out):
    return [point["loss"] for point in read_curves(out)]


def files_equal(first, second):
    (a, b) = ({p.name: load_file(p) for p in folder.glob("*.safetensors")}
              for folder in (first, second))
    assert a.keys() == b.keys() and a
    return all(a[file].keys() == b[file].keys() and
               all(torch.equal(tensor, b[file][name]) for name, tensor in a[file].items())
               for file in a)
