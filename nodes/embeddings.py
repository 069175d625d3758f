"""CONDITIONING to files and back, so that T5 need not be loaded at all."""

from __future__ import annotations

from comfy_api.latest import io

from ..pixart_core.checkpoint import CheckpointError
from .host import embeddings
from .host.files import fingerprint
from .host.schema import CATEGORY, schema

PREFIX = f"{embeddings.FOLDER}/PixArt"


class PixArtSaveEmbeddings(io.ComfyNode):
    """An encoded prompt, into a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtSaveEmbeddings",
            display_name="PixArt Save Embeddings",
            category=f"{CATEGORY}/conditioning",
            description="Saves an encoded prompt, with its masks and sizes, below the output "
                        "folder. Load it on a machine that has no room for T5.",
            search_aliases=["save conditioning", "cache prompt", "export conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning",
                                      tooltip="What PixArt Text Encode, PixArt Prompt Batch or "
                                              "CLIP Text Encode give."),
                io.String.Input("filename_prefix", default=PREFIX,
                                tooltip="Name below the output folder; a number is added. Files "
                                        "in output/embeddings are listed by PixArt Load "
                                        "Embeddings."),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning, filename_prefix=PREFIX) -> io.NodeOutput:
        hidden = cls.hidden
        name = embeddings.save(conditioning, filename_prefix, hidden.prompt, hidden.unique_id,
                               hidden.extra_pnginfo)
        return io.NodeOutput(ui={"text": [name]})


class PixArtLoadEmbeddings(io.ComfyNode):
    """An encoded prompt, from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtLoadEmbeddings",
            display_name="PixArt Load Embeddings",
            category=f"{CATEGORY}/conditioning",
            description="Loads a prompt that PixArt Save Embeddings or `pixart encode` wrote, so "
                        "that no text encoder is loaded. The node shows the prompt.",
            search_aliases=["load conditioning", "cached prompt", "import conditioning"],
            inputs=[
                io.Combo.Input("file", options=embeddings.choices(),
                               tooltip="A .safetensors file in models/embeddings or in "
                                       "output/embeddings."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning",
                                            tooltip="Positive or negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        conditioning, info = embeddings.load(embeddings.full_path(file))
        prompt = info.get("prompt")
        return io.NodeOutput(conditioning, ui={"text": [str(prompt)] if prompt else []})

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        if file is None:
            return True
        try:
            embeddings.check(embeddings.full_path(file))
        except (CheckpointError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return fingerprint(embeddings.full_path(file))
