"""The sizes PixArt was trained on."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..pixart_core.resolution import nearest_bin
from .host.schema import CATEGORY, require_option, schema

RATIOS = {
    "1:1 square": (1, 1), "4:3 landscape": (4, 3), "3:2 landscape": (3, 2),
    "16:9 wide": (16, 9), "21:9 cinema": (21, 9), "3:4 portrait": (3, 4),
    "2:3 portrait": (2, 3), "9:16 tall": (9, 16),
}
CUSTOM = "from width and height"
SHAPES = [*RATIOS, CUSTOM]
BASES = ["256", "512", "1024", "2048", "2880"]


class PixArtResolution(io.ComfyNode):
    """Nearest trained size for a shape, and an empty latent of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtResolution",
            display_name="PixArt Resolution",
            category=f"{CATEGORY}/latent",
            description="Picks the trained size (aspect-ratio bin) nearest to a shape. Pictures "
                        "far from these sizes come out distorted.",
            search_aliases=["aspect ratio", "bins", "empty latent", "size", "pixart size"],
            inputs=[
                io.Combo.Input("base", options=BASES, default="1024",
                               tooltip="The model's training size in pixels: 2048 for the 2K "
                                       "model, 2880 for 4K screens."),
                io.Combo.Input("aspect_ratio", options=SHAPES, default="1:1 square",
                               tooltip="The shape of the picture, or take it from the width and "
                                       "height below."),
                io.Int.Input("width", default=1024, min=8, max=16384, step=8,
                             tooltip=f'Used with "{CUSTOM}": only the ratio to height counts.'),
                io.Int.Input("height", default=1024, min=8, max=16384, step=8,
                             tooltip=f'Used with "{CUSTOM}": only the ratio to width counts.'),
                io.Int.Input("batch_size", default=1, min=1, max=4096,
                             tooltip="Pictures in one run."),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="Width of the bin in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the bin in pixels."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of that size."),
            ],
        )

    @classmethod
    def execute(cls, base, aspect_ratio, width, height, batch_size) -> io.NodeOutput:
        require_option("base", base, BASES)
        require_option("aspect_ratio", aspect_ratio, SHAPES)
        if aspect_ratio != CUSTOM:
            width, height = RATIOS[aspect_ratio]
        height, width = nearest_bin(int(base), height=height, width=width)
        samples = torch.zeros([batch_size, 4, height // 8, width // 8],
                              device=comfy.model_management.intermediate_device())
        return io.NodeOutput(width, height, {"samples": samples})
