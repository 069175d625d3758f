"""Pictures for the PixArt-delta ControlNet: HED edges of a photo, or a drawing that is there."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..pixart_core.checkpoint import CheckpointError
from .host import files
from .host.hed import check_hed, detect_edges, require_tile, to_image
from .host.schema import CATEGORY, advanced, require_option, schema

INVERT = ["auto", "yes", "no"]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what "grey" usually means


class PixArtHEDEdges(io.ComfyNode):
    """IMAGE of edges from any IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtHEDEdges",
            display_name="PixArt HED Edges",
            category=f"{CATEGORY}/image",
            description="Finds the soft edges of a picture with the HED network that the "
                        "PixArt-delta ControlNet was trained with: white on black.",
            search_aliases=["hed", "edge detection", "preprocessor", "soft edge", "annotator",
                            "controlnet hint"],
            inputs=[
                io.Image.Input("image", tooltip="The picture whose edges are wanted, of any size."),
                io.Combo.Input("hed_name", options=files.choices("controlnet"),
                               tooltip="The HED network, ControlNetHED.pth, in "
                                       "models/controlnet."),
                advanced(io.Int.Input, "tile", default=0, min=0, max=8192, step=16,
                         tooltip="Pixels of the squares that large pictures are worked through "
                                 "in: a smaller one needs less memory and gives the same edges. "
                                 "0 tiles above 2048 pixels; otherwise 256 or more."),
            ],
            outputs=[io.Image.Output(display_name="image",
                                     tooltip="White edges on black, for a PixArt ControlNet.")],
        )

    @classmethod
    def execute(cls, image, hed_name, tile=0) -> io.NodeOutput:
        path = files.full_path("controlnet", hed_name)
        return io.NodeOutput(to_image(detect_edges(path, rgb(image), tile)))

    @classmethod
    def validate_inputs(cls, hed_name=None, tile=None) -> bool | str:
        try:
            if tile is not None:
                require_tile(tile)
            if hed_name is not None:
                check_hed(files.full_path("controlnet", hed_name))
        except (CheckpointError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, hed_name, **_) -> str:
        return files.fingerprint(files.full_path("controlnet", hed_name))


class PixArtHint(io.ComfyNode):
    """IMAGE of white lines on black from a drawing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtHint",
            display_name="PixArt Hint from Drawing",
            category=f"{CATEGORY}/image",
            description="Turns a sketch or an edge picture into what the PixArt-delta ControlNet "
                        "wants, white lines on black: grey, and inverted where it is dark on "
                        "light.",
            search_aliases=["hint", "scribble", "sketch", "line art", "invert", "controlnet hint"],
            inputs=[
                io.Image.Input("image", tooltip="A drawing, or edges from any other node."),
                io.Combo.Input("invert", options=INVERT, default="auto",
                               tooltip="auto inverts each picture that is more light than dark, "
                                       "as ink on paper is."),
            ],
            outputs=[io.Image.Output(display_name="image",
                                     tooltip="White lines on black, for a PixArt ControlNet.")],
        )

    @classmethod
    def execute(cls, image, invert) -> io.NodeOutput:
        require_option("invert", invert, INVERT)
        lines = rgb(image, paper=0.0 if invert == "no" else 1.0) @ torch.tensor(
            _LUMA, device=image.device)
        lines = lines[..., None].clamp(0, 1)  # (B, H, W, 1)
        if invert == "auto":
            light = lines.mean(dim=(1, 2, 3), keepdim=True) > 0.5
            lines = torch.where(light, 1 - lines, lines)
        elif invert == "yes":
            lines = 1 - lines
        return io.NodeOutput(to_image(lines))


def rgb(image: Tensor, paper: float = 1.0) -> Tensor:
    """(B, H, W, 1, 3 or 4) -> (B, H, W, 3) float32; what is transparent shows `paper`.

    Raises ValueError for any other shape.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"the image is {tuple(image.shape)}; (B, H, W, C) of 1, 3 or 4 channels "
                         "was expected")
    image = image.float()
    if image.shape[-1] == 4:
        alpha = image[..., 3:]
        return image[..., :3] * alpha + paper * (1 - alpha)
    return image.expand(*image.shape[:3], 3)
