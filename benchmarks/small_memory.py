"""What a 1024-px picture needs in memory, phase by phase, at every precision.

`python -m benchmarks.small_memory` builds T5-XXL, PixArt XL/2 and the VAE at full size on the meta
device and counts the bytes of every tensor alive while each runs: nothing is computed, and no
weights are needed. Each phase holds its own model alone, and T5 computes in float32, as the nodes
do it. On a card, add what CUDA itself takes and the allocator's rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import pixart_core as pc
from pixart_core.quant import StoredWeight, pack_linears, packed_operations
from pixart_core.quant.eight_bit import Float8E4M3, Int8
from pixart_core.quant.four_bit import GROUP, Int4
from pixart_core.quant.policy import METHODS, t5_layers, t5_options, transformer_layers
from pixart_core.quant.stored import Tensors, WeightFormat
from pixart_core.quant.svdquant_format import SVDQuant
from pixart_core.text.encoder import build_encoder
from pixart_core.text.t5_file import EMBEDDING, T5Config, T5File, expected_shapes
from pixart_core.vae import VAE

from .live_bytes import LiveBytes, fused_attention, weight_bytes
from .measure import GB, command, table, versions

META = torch.device("meta")
T5_XXL = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
RANK = 32
TILES = "bf16, tiles of 512 px"
KL = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2,
      "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
      "sample_size": 512}


class Phase(NamedTuple):
    """Bytes of weights, and the most that all else took at a time."""

    weights: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.rest

    def row(self, *names: str) -> list[str]:
        return [*names, *(f"{n / GB:.2f}" for n in (self.weights, self.rest, self.total))]


def main(argv: Sequence[str] | None = None) -> str:
    """Count, print and return the report."""
    options = _arguments().parse_args(argv)
    texts, models, vaes = all_phases(options.pixels, options.tokens, options.guidance)
    header = ["phase", "precision", "weights, GB", "activations, GB", "sum, GB"]
    rows = [phase.row(label, name) for label, phases in (
        (f"T5-XXL, {options.tokens} tokens", texts),
        (f"XL/2, {options.pixels} px{', guidance' if options.guidance else ''}", models),
        ("VAE decoding", vaes)) for name, phase in phases.items()]
    peaks = [[name, *(f"{p.total / GB:.2f}" for p in phases),
              f"**{max(p.total for p in phases) / GB:.2f}**"]
             for name, phases in recipes_of(texts, models, vaes).items()]
    report = "\n".join([
        f"Counted, not timed; {versions()}.\n", f"Command: `{command()}`\n",
        table(header, rows),
        table(["recipe", "text", "sampling", "decoding", "peak, GB"], peaks)])
    print(report)
    if options.out:
        options.out.write_text(report)
    return report


def recipe_phases(pixels: int = 1024, tokens: int = 300,
                  ) -> dict[str, tuple[Phase, Phase, Phase]]:
    """Text encoding, sampling and decoding of every recipe, without guidance."""
    return recipes_of(*all_phases(pixels, tokens, False))


def all_phases(pixels: int, tokens: int, guidance: bool) -> tuple[dict[str, Phase], ...]:
    """T5, the transformer and the VAE at every precision."""
    texts = {name: text_phase(name, tokens) for name in ("bf16", "fp8", "int8", "int4")}
    models = {name: model_phase(name, pixels, tokens, guidance)
              for name in ("bf16", "int8", "int4", "svdquant")}
    vaes = {"float32, whole": vae_phase(torch.float32, False, pixels),
            "bf16, whole": vae_phase(torch.bfloat16, False, pixels),
            TILES: vae_phase(torch.bfloat16, True, pixels),
            "TAESD bf16": vae_phase(torch.bfloat16, False, pixels, tiny=True)}
    return texts, models, vaes


def recipes_of(texts: Mapping[str, Phase], models: Mapping[str, Phase],
               vaes: Mapping[str, Phase]) -> dict[str, tuple[Phase, Phase, Phase]]:
    """The recipes of docs/small-memory.md, the largest first."""
    return {
        "As released: all in 16 bits, VAE in 32":
            (texts["bf16"], models["bf16"], vaes["float32, whole"]),
        "8 GB: T5 int8": (texts["int8"], models["bf16"], vaes["bf16, whole"]),
        "6 GB: T5 int4, VAE in tiles": (texts["int4"], models["bf16"], vaes[TILES]),
        "4 GB: T5 int4, SVDQuant, VAE in tiles": (texts["int4"], models["svdquant"], vaes[TILES]),
        "T5 on the CPU: SVDQuant, VAE in tiles": (Phase(0, 0), models["svdquant"], vaes[TILES]),
    }


@dataclass(frozen=True)
class Cast(WeightFormat):
    """A 16-bit weight, cast for each product to what the host computes in."""

    shape: torch.Size
    name: ClassVar[str] = "bf16"

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return tensors["weight"].view(torch.bfloat16).to(dtype)


def text_phase(precision: str, tokens: int, config: T5Config = T5_XXL) -> Phase:
    """T5 over one prompt, as ComfyUI runs it: matrices in the precision, activations in float32."""
    shapes = {name: torch.Size(shape) for name, shape in expected_shapes(config).items()}
    layers = t5_layers(shapes, METHODS["int8"])
    weights = {name: torch.empty(shape, device=META,
                                 dtype=torch.bfloat16 if name == EMBEDDING else torch.float32)
               for name, shape in shapes.items() if name not in layers}
    packed = {name: _t5_weight(precision, shapes[name]) for name in layers}
    model = build_encoder(T5File(Path("t5"), weights, config, torch.bfloat16, packed=packed))
    model.shared.register_forward_hook(lambda _module, _ids, states: states.float())
    ids = torch.zeros(1, tokens, dtype=torch.long, device=META)
    return _phase(lambda: model(input_ids=ids), model)


def _t5_weight(precision: str, shape: torch.Size) -> StoredWeight:
    if precision == "bf16":
        return StoredWeight(Cast(shape), {"weight": torch.empty(shape, dtype=torch.bfloat16,
                                                                device=META)})
    return placeholder(precision, shape, t5_options(METHODS[precision]))


def model_phase(precision: str, pixels: int, tokens: int, guidance: bool) -> Phase:
    """The transformer over one step; with guidance, the prompt and the null caption at once."""
    config = pc.PRESETS["sigma-1024"]
    model = pc.PixArtTransformer(config, dtype=torch.bfloat16, device=META,
                                 operations=packed_operations(), attention=fused_attention)
    if precision != "bf16":
        shapes = {name: t.shape for name, t in model.state_dict().items()}
        layers = transformer_layers(shapes, METHODS[precision])
        pack_linears(model, {name: placeholder(precision, shapes[name]) for name in layers})
    batch = 2 if guidance else 1
    side = pixels // 8
    x = torch.empty(batch, 4, side, side, dtype=torch.bfloat16, device=META)
    t = torch.empty(batch, device=META)
    caption = torch.empty(batch, tokens, config.caption_channels, dtype=x.dtype, device=META)

    def step() -> Tensor:
        return model(x, t, model.prepare_caption(caption))

    return _phase(step, model)


def vae_phase(dtype: torch.dtype, tiled: bool, pixels: int, tiny: bool = False) -> Phase:
    """A picture out of latents, by SDXL's VAE or TAESD."""
    import diffusers

    with META:
        network = diffusers.AutoencoderTiny() if tiny else diffusers.AutoencoderKL(**KL)
    network.encoder = None  # a picture is made with the decoder alone
    network = network.to(dtype).requires_grad_(False).eval()
    vae = VAE(network, 1.0)
    vae.enable_tiling(tiled)
    latents = torch.empty(1, 4, pixels // 8, pixels // 8, device=META)
    return _phase(lambda: vae.decode(latents), network)


def placeholder(precision: str, shape: torch.Size, options: dict | None = None) -> StoredWeight:
    """A quantised weight (out, in) without memory, its tensors as a file has them."""
    rows, columns = shape

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    if precision == "int8":
        return StoredWeight(Int8(shape, options or {}), {
            "weight": empty(rows, columns, dtype=torch.int8),
            "weight_scale": empty(rows, 1, dtype=torch.float32)})
    if precision == "fp8":
        return StoredWeight(Float8E4M3(shape, options or {}), {
            "weight": empty(rows, columns, dtype=torch.float8_e4m3fn),
            "weight_scale": empty(dtype=torch.float32)})
    if precision == "int4":
        return StoredWeight(Int4(shape, {"group_size": GROUP}), {
            "weight": empty(rows, columns // 2, dtype=torch.int8),
            "weight_scale": empty(columns // GROUP, rows),
            "weight_zero": empty(columns // GROUP, rows)})
    return SVDQuant.from_layer(
        empty(rows, columns // 2, dtype=torch.int8), empty(columns // GROUP, rows),
        empty(columns), empty(columns, RANK), empty(rows, RANK), act_unsigned=rows < columns)


def _phase(run: Callable[[], object], model: nn.Module) -> Phase:
    counter = LiveBytes()
    with torch.inference_mode(False), torch.no_grad(), counter:
        run()
    return Phase(weight_bytes(model), counter.peak)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--guidance", action="store_true", help="prompt and null caption at once")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
