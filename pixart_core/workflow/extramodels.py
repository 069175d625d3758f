"""The nodes of ComfyUI_ExtraModels, October 2023 to December 2024, as workflows hold them.

Ids and inputs hardly changed in that time: T5v11Loader got `dtype` in November 2023 (before, the
bnb modes were devices), and PixArtDPMSampler was taken out in April 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

ANOTHER_MODEL = "for another model than PixArt; nothing here replaces it"


@dataclass(frozen=True)
class OldNode:
    """Title, sockets and widgets of a node; `optional` counts the last widgets that early
    versions lacked, `seed` is a widget with a control behind it."""

    title: str
    sockets: tuple[str, ...] = ()
    widgets: tuple[str, ...] = ()
    optional: int = 0
    seed: str | None = None


OLD_NODES = {
    "PixArtCheckpointLoader": OldNode("PixArt Checkpoint Loader", (), ("ckpt_name", "model")),
    "PixArtCheckpointLoaderSimple": OldNode("PixArt Checkpoint Loader (auto)", (), ("ckpt_name",)),
    "PixArtResolutionSelect": OldNode("PixArt Resolution Select", (), ("model", "ratio")),
    "PixArtLoraLoader": OldNode("PixArt Load LoRA", ("model",), ("lora_name", "strength")),
    "PixArtResolutionCond": OldNode("PixArt Resolution Conditioning", ("cond",),
                                    ("width", "height")),
    "PixArtControlNetCond": OldNode("PixArt ControlNet Conditioning", ("cond", "latent")),
    "PixArtDPMSampler": OldNode("PixArt DPM Sampler [Reference]",
                                ("model", "positive", "negative", "latent_image"),
                                ("seed", "steps", "cfg", "noise_schedule", "noise_schedule_vp"),
                                seed="seed"),
    "PixArtT5TextEncode": OldNode("PixArt T5 Text Encode [Reference]", ("T5",), ("text",)),
    "PixArtT5FromSD3CLIP": OldNode("PixArt T5 from SD3 CLIP", ("sd3_clip",), ("padding",)),
    "T5v11Loader": OldNode("T5v1.1 Loader", (),
                           ("t5v11_name", "t5v11_ver", "path_type", "device", "dtype"),
                           optional=1),
    "T5TextEncode": OldNode("T5 Text Encode", ("T5",), ("text",)),
    "ExtraVAELoader": OldNode("ExtraVAELoader", (), ("vae_name", "vae_type", "dtype")),
}

NOT_MAPPED = {
    **dict.fromkeys((
        "DitCheckpointLoader", "DiTCondLabelSelect", "DiTCondLabelEmpty",
        "HYDiTCheckpointLoader", "HYDiTTextEncoderLoader", "HYDiTTextEncode",
        "HYDiTTextEncodeSimple", "HYDiTSrcSizeCond",
        "MiaoBiCLIPLoader", "MiaoBiDiffusersLoader",
        "SanaCheckpointLoader", "SanaResolutionSelect", "SanaTextEncode", "SanaResolutionCond",
        "EmptySanaLatentImage", "EmptyDCAELatentImage", "GemmaLoader", "GemmaTextEncode",
    ), ANOTHER_MODEL),
    "OverrideCLIPDevice": "ComfyUI places models itself; take the node out, and set device to cpu "
                          "on PixArt T5 Loader to keep T5 off the card",
    "OverrideVAEDevice": "ComfyUI places models itself; take the node out, or start ComfyUI with "
                         "--cpu-vae",
}
"""Every other node of that pack, and why it is left as it is."""

FAMILIES = {
    "PixArtMS_XL_2": "alpha", "PixArt_XL_2": "alpha",
    "PixArtMS_Sigma_XL_2": "sigma", "PixArtMS_Sigma_XL_2_900M": "sigma",
    "PixArtMS_Sigma_XL_2_2K": "sigma",
    "ControlPixArtHalf": "alpha", "ControlPixArtMSHalf": "alpha",
}
"""`model` of PixArtCheckpointLoader -> which PixArt that is."""

CONTROL_BASES = {"ControlPixArtHalf": "PixArt-XL-2-512x512.pth",
                 "ControlPixArtMSHalf": "PixArt-XL-2-1024-MS.pth"}
"""ControlNet files -> the released base model of their size."""

IMAGE_SIZES = {"PixArtMS_Sigma_XL_2_2K": 2048, "PixArt_XL_2": 512}
"""Sizes that a diffusers file without its config.json does not tell."""

BASES = {"PixArtMS_XL_2": "1024", "PixArt_XL_2": "512", "PixArtMS_Sigma_XL_2": "1024",
         "PixArtMS_Sigma_XL_2_512": "512", "PixArtMS_Sigma_XL_2_2K": "2048"}
"""`model` of PixArtResolutionSelect -> base of PixArt Resolution."""

TOKENS = {"alpha": 120, "sigma": 300}
