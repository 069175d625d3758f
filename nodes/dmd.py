"""PixArt-DMD sampling: one step, no guidance (arXiv 2311.18828)."""

from __future__ import annotations

from comfy_api.latest import io

from .host.dmd import dmd_sampler, dmd_sigmas
from .host.sampling import sample_without_guidance
from .host.schema import CATEGORY, schema


class PixArtDMDSampler(io.ComfyNode):
    """LATENT from a DMD student in one step, one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtDMDSampler",
            display_name="PixArt DMD Sampler",
            category=f"{CATEGORY}/sampling",
            description="Samples a PixArt model with DMD weights (distribution matching "
                        "distillation) in one step, without guidance or negative prompt.",
            search_aliases=["dmd", "one step", "distribution matching", "fast sampler"],
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model with DMD weights, such as "
                                                "PixArt-Alpha-DMD-XL-2-512x512."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Latent.Input("latent", tooltip="An empty latent of the size you want. The "
                                                  "student starts from noise alone: a picture in "
                                                  "the latent only stays outside a latent mask."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                             control_after_generate=True,
                             tooltip="The noise to start from; the same seed gives the same "
                                     "picture."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Ready for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, latent, seed) -> io.NodeOutput:
        return io.NodeOutput(
            sample_without_guidance(model, positive, latent, seed, dmd_sampler(), dmd_sigmas()))


class PixArtDMDSchedule(io.ComfyNode):
    """SAMPLER and SIGMAS of the same step, for the custom sampling nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtDMDSchedule",
            display_name="PixArt DMD Schedule",
            category=f"{CATEGORY}/sampling",
            description="The one-step DMD sampler and its noise level, for SamplerCustom and "
                        "SamplerCustomAdvanced. Use cfg 1.",
            search_aliases=["dmd sigmas", "one step", "distribution matching"],
            inputs=[],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="Goes to a custom sampler."),
                io.Sigmas.Output(display_name="sigmas", tooltip="Goes to a custom sampler."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(dmd_sampler(), dmd_sigmas())
