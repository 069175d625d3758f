"""PixArt-delta sampling: 1 to 8 steps, no guidance (arXiv 2401.05252)."""

from __future__ import annotations

from comfy_api.latest import io

from ..pixart_core.sampling import lcm_timesteps
from .host.sampling import lcm_sampler, lcm_sigmas, sample_without_guidance
from .host.schema import CATEGORY, advanced, schema

GRIDS = ["diffusers", "official"]
MAX_STEPS = 50


def _steps() -> io.Int.Input:
    return io.Int.Input("steps", default=4, min=1, max=MAX_STEPS,
                        tooltip="Sampling steps: 4 is the usual number, 2 is faster and rougher, "
                                "more than 8 gains nothing.")


def _strength() -> io.Float.Input:
    return io.Float.Input("strength", default=1.0, min=0.02, max=1.0, step=0.01,
                          tooltip="How much of the latent is made new: 1 starts from noise alone, "
                                  "lower values keep more of an encoded image.")


def _grid() -> io.Combo.Input:
    return advanced(io.Combo.Input, "grid", options=GRIDS, default="diffusers",
                    tooltip="Which published list of timesteps to use: that of diffusers' "
                            "LCMScheduler or that of the PixArt-alpha repository. They differ at "
                            "3, 4, 6 and 8 steps.")


class PixArtLCMSampler(io.ComfyNode):
    """LATENT from a distilled model in a few steps, one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtLCMSampler",
            display_name="PixArt LCM Sampler",
            category=f"{CATEGORY}/sampling",
            description="Samples a PixArt-delta (LCM) model in 1 to 8 steps. No guidance and no "
                        "negative prompt: both are distilled into the weights.",
            search_aliases=["lcm", "pixart delta", "few steps", "consistency", "fast sampler"],
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model with LCM weights, or any PixArt "
                                                "model with an LCM LoRA."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Latent.Input("latent", tooltip="An empty latent, or an encoded image together "
                                                  "with a strength below 1."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                             control_after_generate=True,
                             tooltip="The noise to start from; the same seed gives the same "
                                     "picture."),
                _steps(), _strength(), _grid(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Ready for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, latent, seed, steps, strength,
                grid="diffusers") -> io.NodeOutput:
        sigmas = lcm_sigmas(lcm_timesteps(steps, grid, strength))
        return io.NodeOutput(
            sample_without_guidance(model, positive, latent, seed, lcm_sampler(), sigmas))

    @classmethod
    def validate_inputs(cls, steps=None, strength=None) -> bool | str:
        return check_schedule(steps, strength)


class PixArtLCMSchedule(io.ComfyNode):
    """SAMPLER and SIGMAS of the same run, for the custom sampling nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtLCMSchedule",
            display_name="PixArt LCM Schedule",
            category=f"{CATEGORY}/sampling",
            description="The LCM sampler and its exact noise levels, for SamplerCustom and "
                        "SamplerCustomAdvanced. Use cfg 1.",
            search_aliases=["lcm sigmas", "lcm scheduler", "pixart delta"],
            inputs=[_steps(), _strength(), _grid()],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="Goes to a custom sampler."),
                io.Sigmas.Output(display_name="sigmas", tooltip="Goes to a custom sampler."),
            ],
        )

    @classmethod
    def execute(cls, steps, strength, grid="diffusers") -> io.NodeOutput:
        return io.NodeOutput(lcm_sampler(), lcm_sigmas(lcm_timesteps(steps, grid, strength)))

    @classmethod
    def validate_inputs(cls, steps=None, strength=None) -> bool | str:
        return check_schedule(steps, strength)


def check_schedule(steps: int | None, strength: float | None) -> bool | str:
    """True, or why no schedule has these values; a value that comes by wire (None) waits.

    The grid is left to the host, which repeats the answer for every input that is asked for.
    """
    if steps is None or strength is None:
        return True
    try:
        lcm_timesteps(steps, strength=strength)
    except ValueError as error:
        return str(error)
    return True
