"""The nodes that an upgraded workflow is made of: this pack's, and ComfyUI's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONTROL_AFTER = ("fixed", "increment", "decrement", "randomize")
"""Values of the widget the web page adds behind a seed; it is in no prompt."""


@dataclass(frozen=True)
class Target:
    """Inputs and outputs of a node as the web page lays them out, in its order.

    `sockets` and `outputs` are {name: type}; `widgets` is {name: (type, default)}.
    """

    display_name: str
    sockets: dict[str, str]
    widgets: dict[str, tuple[str, Any]]
    outputs: dict[str, str]
    stock: bool = False
    seed: str | None = None  # the widget that has a control behind it

    def widget_values(self, values: dict[str, Any], control: str = "fixed") -> list[Any]:
        """`values` over the defaults, as the page saves them."""
        row: list[Any] = []
        for name, (_, default) in self.widgets.items():
            row.append(values.get(name, default))
            if name == self.seed:
                row.append(control)
        return row

    def widget_index(self, name: str) -> int:
        """Where the value of a widget lies in `widget_values`."""
        names = list(self.widgets)
        index = names.index(name)
        return index + (self.seed is not None and self.seed in names[:index])


TARGETS = {
    "PixArtLoader": Target(
        "PixArt Model Loader", {},
        {"model_name": ("COMBO", ""), "weight_dtype": ("COMBO", "auto"),
         "variant": ("COMBO", "auto")},
        {"model": "MODEL"}),
    "PixArtT5Loader": Target(
        "PixArt T5 Loader", {},
        {"t5_name": ("COMBO", ""), "device": ("COMBO", "default"), "precision": ("COMBO", "auto"),
         "text_cache": ("BOOLEAN", False)},
        {"clip": "CLIP"}),
    "PixArtTextEncode": Target(
        "PixArt Text Encode", {"clip": "CLIP", "model": "MODEL"},
        {"text": ("STRING", ""), "clean_caption": ("BOOLEAN", True), "max_tokens": ("INT", 300),
         "width": ("INT", 0), "height": ("INT", 0), "aspect_ratio": ("FLOAT", 0.0),
         "weights": ("BOOLEAN", True)},
        {"conditioning": "CONDITIONING"}),
    "PixArtResolution": Target(
        "PixArt Resolution", {},
        {"base": ("COMBO", "1024"), "aspect_ratio": ("COMBO", "1:1 square"),
         "width": ("INT", 1024), "height": ("INT", 1024), "batch_size": ("INT", 1)},
        {"width": "INT", "height": "INT", "latent": "LATENT"}),
    "PixArtLoRALoader": Target(
        "PixArt LoRA Loader", {"model": "MODEL"},
        {"lora_name": ("COMBO", ""), "strength": ("FLOAT", 1.0), "alpha": ("FLOAT", 0.0)},
        {"model": "MODEL"}),
    "PixArtControlNetLoader": Target(
        "PixArt ControlNet Loader", {},
        {"control_net_name": ("COMBO", ""), "weight_dtype": ("COMBO", "auto")},
        {"control_net": "CONTROL_NET"}),
    "PixArtControlNetApply": Target(
        "PixArt ControlNet Apply",
        {"positive": "CONDITIONING", "control_net": "CONTROL_NET", "image": "IMAGE", "vae": "VAE",
         "negative": "CONDITIONING"},
        {"strength": ("FLOAT", 1.0), "start_percent": ("FLOAT", 0.0), "end_percent": ("FLOAT", 1.0),
         "mode": ("COMBO", "balanced"), "cond_only": ("BOOLEAN", False)},
        {"positive": "CONDITIONING", "negative": "CONDITIONING"}),
    "VAELoader": Target(
        "Load VAE", {}, {"vae_name": ("COMBO", "")}, {"VAE": "VAE"}, stock=True),
    "KSampler": Target(
        "KSampler",
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING",
         "latent_image": "LATENT"},
        {"seed": ("INT", 0), "steps": ("INT", 20), "cfg": ("FLOAT", 8.0),
         "sampler_name": ("COMBO", "euler"), "scheduler": ("COMBO", "simple"),
         "denoise": ("FLOAT", 1.0)},
        {"LATENT": "LATENT"}, stock=True, seed="seed"),
}
