"""ControlNet-Transformer of PixArt-delta: CONTROL_NET from files, applied to conditioning."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..pixart_core.model.controlnet import ControlMode, mode_weights
from .host import files
from .host.control import PixArtControl, check_control, load_control, report_control
from .host.schema import CATEGORY, advanced, require_option, schema
from .host.transformer import WRONG_CONTROL
from .loaders import DTYPES, check_file, shown

NO_NEGATIVE = ("PixArt ControlNet Apply has no negative to hand on: wire the negative prompt "
               "through it too, or use a sampler without one (PixArt LCM Sampler)")
MODES: dict[str, ControlMode] = {
    "balanced": "balanced",
    "prompt matters more": "prompt",
    "control matters more": "control",
}


class PixArtControlNetLoader(io.ComfyNode):
    """CONTROL_NET from any PixArt ControlNet file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtControlNetLoader",
            display_name="PixArt ControlNet Loader",
            category=f"{CATEGORY}/loaders",
            description="Loads a ControlNet for PixArt-alpha, delta or Sigma: the original .pth "
                        "(the base model in it is left out), diffusers and SimpleTuner files and "
                        "folders.",
            search_aliases=["controlnet", "pixart controlnet", "hed", "load controlnet"],
            inputs=[
                io.Combo.Input("control_net_name", options=files.choices("controlnet"),
                               tooltip="A PixArt ControlNet in models/controlnet."),
                advanced(io.Combo.Input, "weight_dtype", options=list(DTYPES), default="auto",
                         tooltip="auto lets ComfyUI choose for your card; float8 halves the "
                                 "memory."),
            ],
            outputs=[io.ControlNet.Output(
                display_name="control_net",
                tooltip="For PixArt ControlNet Apply or Apply ControlNet.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, control_net_name, weight_dtype="auto") -> io.NodeOutput:
        require_option("weight_dtype", weight_dtype, DTYPES)
        path = files.full_path("controlnet", control_net_name)
        control = load_control(path, DTYPES[weight_dtype])
        return io.NodeOutput(control, ui=shown(report_control(control, cls.hidden.unique_id)))

    @classmethod
    def validate_inputs(cls, control_net_name=None) -> bool | str:
        return check_file(check_control, "controlnet", control_net_name)

    @classmethod
    def fingerprint_inputs(cls, control_net_name, **_) -> str:
        return files.fingerprint(files.full_path("controlnet", control_net_name))


class PixArtControlNetApply(io.ComfyNode):
    """Conditioning that a ControlNet steers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtControlNetApply",
            display_name="PixArt ControlNet Apply",
            category=f"{CATEGORY}/conditioning",
            description="Steers a PixArt picture by an image, such as edges from PixArt HED "
                        "Edges. Chain several to add them up.",
            search_aliases=["controlnet", "apply controlnet", "use controlnet", "control mode"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.ControlNet.Input("control_net", tooltip="From PixArt ControlNet Loader."),
                io.Image.Input("image", tooltip="The control image, for HED white edges on black. "
                                                "It is scaled and cut to the picture's size."),
                io.Vae.Input("vae", tooltip="The VAE of the model; the ControlNet reads latents."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                               tooltip="Multiplies what the ControlNet adds; 0 switches it off."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                               tooltip="Steps before this part of sampling are left alone."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                               tooltip="Steps after this part of sampling are left alone."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="What it avoids; leave it out with LCM models."),
                advanced(io.Combo.Input, "mode", options=list(MODES), default="balanced",
                         tooltip="prompt matters more fades what the first blocks add. control "
                                 "matters more does so too and steers the positive half only, so "
                                 "that guidance multiplies the control. Without guidance (LCM) use "
                                 "balanced."),
                advanced(io.Boolean.Input, "cond_only", default=False,
                         tooltip="Steer the positive half of guidance only, in any mode."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive",
                                       tooltip="To the sampler, or to another ControlNet."),
                io.Conditioning.Output(display_name="negative",
                                       tooltip="To the sampler, or to another ControlNet."),
            ],
        )

    @classmethod
    def execute(cls, positive, control_net, image, vae, strength=1.0, start_percent=0.0,
                end_percent=1.0, negative=None, mode="balanced",
                cond_only=False) -> io.NodeOutput:
        require_option("mode", mode, MODES)
        if not isinstance(control_net, PixArtControl):
            raise ValueError(WRONG_CONTROL)
        if strength == 0:
            return io.NodeOutput(positive, ExecutionBlocker(NO_NEGATIVE)
                                 if negative is None else negative)
        hint = image.movedim(-1, 1)
        used: dict[Any, PixArtControl] = {}

        def steered(conditioning: list) -> list:
            return [[states, {**options, "control": control(options.get("control")),
                              "control_apply_to_uncond": False}]
                    for states, options in conditioning]

        def control(earlier: Any) -> PixArtControl:
            # one object for both halves, or the host would not run them as one batch
            if earlier not in used:
                one = control_net.copy().set_cond_hint(hint, strength,
                                                       (start_percent, end_percent), vae)
                one.weights = mode_weights(MODES[mode], one.network.config.depth)
                one.cond_only = cond_only or MODES[mode] == "control"
                used[earlier] = one.set_previous_controlnet(earlier)
            return used[earlier]

        # whatever is wired to a negative that is not there stops with this message
        return io.NodeOutput(steered(positive), ExecutionBlocker(NO_NEGATIVE)
                             if negative is None else steered(negative))
