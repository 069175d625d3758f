"""LoRAs of every layout on a MODEL."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .host import files
from .host.lora import apply_lora, check_lora, load_lora, lora_fingerprint, report_lora
from .host.schema import CATEGORY, advanced, schema
from .loaders import check_file

logger = logging.getLogger(__name__)

STRENGTH = 100.0


class PixArtLoRALoader(io.ComfyNode):
    """MODEL with a LoRA, from any file or folder trained on PixArt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtLoRALoader",
            display_name="PixArt LoRA Loader",
            category=f"{CATEGORY}/loaders",
            description="Puts a LoRA on a PixArt model, with the strength it was trained for: "
                        "PEFT folders and files (with alpha, rsLoRA, DoRA), diffusers, OneTrainer, "
                        "Kohya and LyCORIS (LoHa, LoKr) files. LCM-LoRA, too.",
            search_aliases=["lora", "pixart lora", "lcm lora", "lycoris", "loha", "lokr", "dora",
                            "peft", "load lora"],
            inputs=[
                io.Model.Input("model", tooltip="From PixArt Model Loader or Load Diffusion "
                                                "Model; LoRAs can follow each other."),
                io.Combo.Input("lora_name", options=files.choices("loras"),
                               tooltip="A LoRA in models/loras: a file, or a PEFT folder with its "
                                       "adapter_config.json."),
                io.Float.Input("strength", default=1.0, min=-STRENGTH, max=STRENGTH, step=0.01,
                               tooltip="1 is as trained, 0 is without, below 0 is the opposite."),
                advanced(io.Float.Input, "alpha", default=0.0, min=0.0, max=10000.0, step=0.5,
                         tooltip="0 takes alpha from the file or its adapter_config.json. Give it "
                                 "for a PEFT file that lost its config (8 in PixArt's own "
                                 "training scripts): the LoRA is multiplied by alpha / rank."),
            ],
            outputs=[io.Model.Output(display_name="model",
                                     tooltip="The model with the LoRA; the one that came in is "
                                             "unchanged.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora_name, strength=1.0, alpha=0.0) -> io.NodeOutput:
        lora = load_lora(files.full_path("loras", lora_name), alpha or None)
        patched, notes = apply_lora(model, lora, strength)
        for note in notes:
            logger.warning(note)
        text = report_lora(lora, notes, cls.hidden.unique_id)
        return io.NodeOutput(patched, ui={"text": [text]})

    @classmethod
    def validate_inputs(cls, lora_name=None) -> bool | str:
        return check_file(check_lora, "loras", lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_) -> str:
        return lora_fingerprint(files.full_path("loras", lora_name))
