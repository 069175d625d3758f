"""The node pack: every PixArt node ComfyUI shows."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .conditioning import PixArtNullCaption, PixArtTextEncode
from .control import PixArtControlNetApply, PixArtControlNetLoader
from .dmd import PixArtDMDSampler, PixArtDMDSchedule
from .embeddings import PixArtLoadEmbeddings, PixArtSaveEmbeddings
from .hed import PixArtHEDEdges, PixArtHint
from .host import files
from .lcm import PixArtLCMSampler, PixArtLCMSchedule
from .loaders import PixArtLoader, PixArtT5Loader
from .lora import PixArtLoRALoader
from .prompts import PixArtPromptBatch
from .resolution import PixArtResolution
from .schedule import PixArtSASolver, PixArtSchedule

NODES: list[type[io.ComfyNode]] = [
    PixArtLoader,
    PixArtT5Loader,
    PixArtControlNetLoader,
    PixArtControlNetApply,
    PixArtLoRALoader,
    PixArtTextEncode,
    PixArtPromptBatch,
    PixArtNullCaption,
    PixArtSaveEmbeddings,
    PixArtLoadEmbeddings,
    PixArtResolution,
    PixArtLCMSampler,
    PixArtLCMSchedule,
    PixArtDMDSampler,
    PixArtDMDSchedule,
    PixArtSchedule,
    PixArtSASolver,
    PixArtHEDEdges,
    PixArtHint,
]


class PixArtExtension(ComfyExtension):
    """Hands the nodes to the host."""

    def __init__(self) -> None:
        super().__init__()
        # not in on_load: hosts before 0.14 never call it
        files.register_starter()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
