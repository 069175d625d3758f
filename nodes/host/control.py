"""A PixArt ControlNet as the host's CONTROL_NET.

The host calls `get_control` before each model call; here that encodes the hint, once for each
size, and names the network and its strength. The copied blocks run inside the model, after its
first block, whose output they need.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...pixart_core.control_image import fit_image
from ...pixart_core.load import assign_weights, require_finite
from ...pixart_core.load_control import OpenedControlNet, read_controlnet
from ...pixart_core.model.controlnet import Control, PixArtControlNet, check_fit
from .conds import Area
from .files import fingerprint
from .model import weight_dtypes
from .transformer import WRONG_CONTROL, WRONG_MODEL, Controls, HostTransformer, host_operations

logger = logging.getLogger(__name__)

LATENT_PIXELS = 8
NO_VAE = ("a PixArt ControlNet needs the VAE of the model to encode its image: wire it to "
          "PixArt ControlNet Apply or Apply ControlNet")
PATCH = 2
# a percentage that names a step becomes that step's sigma only up to rounding; the next step is
# a hundred times as far away
ROUNDING = 1e-5


class PixArtControl(comfy.controlnet.ControlBase):
    """CONTROL_NET: one ControlNet, its hint, strength and range of steps.

    `weights` are factors for each copied block (see `mode_weights`), `cond_only` leaves the
    negative half of a guidance batch alone.
    """

    def __init__(self, network: PixArtControlNet,
                 patcher: comfy.model_patcher.ModelPatcher) -> None:
        super().__init__()
        self.network = network
        self.patcher = patcher
        self.weights: tuple[float, ...] | None = None
        self.cond_only = False
        self._scale: Callable[[Tensor], Tensor] | None = None
        self._latents: dict[tuple[int, int], Tensor] = {}

    @property
    def residual_count(self) -> int:
        """Token tensors that this control and those before it add; they share one set."""
        earlier = getattr(self.previous_controlnet, "residual_count", 0)
        return max(self.network.config.depth, earlier)

    def copy(self) -> PixArtControl:
        """Another use of the same weights."""
        other = PixArtControl(self.network, self.patcher)
        self.copy_to(other)
        other.weights, other.cond_only = self.weights, self.cond_only
        return other

    def deepclone_multigpu(self, load_device: torch.device,
                           autoregister: bool = False) -> PixArtControl:
        """The same control with weights of its own on another device."""
        other = self.copy()
        other.network = copy.deepcopy(self.network)
        other.patcher = comfy.model_patcher.ModelPatcher(
            other.network, load_device=load_device,
            offload_device=comfy.model_management.unet_offload_device())
        if autoregister:
            self.multigpu_clones[load_device] = other
        return other

    def set_cond_hint(self, cond_hint: Tensor, strength: float = 1.0,
                      timestep_percent_range: tuple[float, float] = (0.0, 1.0), vae: Any = None,
                      extra_concat: Any = ()) -> PixArtControl:
        """Take the hint (B, C, H, W) in 0..1; raises ValueError without a VAE."""
        if vae is None:
            raise ValueError(NO_VAE)
        super().set_cond_hint(cond_hint, strength, timestep_percent_range)
        self.vae = vae
        return self

    def pre_run(self, model: Any, percent_to_timestep_function: Callable) -> None:
        """Called when sampling starts; raises ValueError for a model this cannot steer."""
        network = getattr(model, "diffusion_model", None)
        if not isinstance(network, HostTransformer):
            raise ValueError(f"the model is a {type(model).__name__}: {WRONG_MODEL}")
        earlier = self.previous_controlnet
        if earlier is not None and not isinstance(earlier, PixArtControl):
            raise ValueError(WRONG_CONTROL)
        if self.cond_hint_original is None:
            raise ValueError("the PixArt ControlNet has no image; apply it with PixArt ControlNet "
                             "Apply or Apply ControlNet")
        check_fit(self.network.config, network.config)
        variant = self.network.config.variant
        if variant not in (None, network.config.variant):
            logger.warning("the ControlNet was trained for PixArt-%s, the model is PixArt-%s: its "
                           "hint is encoded by another VAE than it knows", variant,
                           network.config.variant)
        super().pre_run(model, percent_to_timestep_function)
        self._scale = model.process_latent_in

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int,
                    transformer_options: dict[str, Any]) -> Controls | None:
        """What the model adds at noise level `t`: this control and those before it."""
        controls: list[Control] = []
        if self.previous_controlnet is not None:
            controls += self.previous_controlnet.get_control(
                x_noisy, t, cond, batched_number, transformer_options) or ()
        first, last = self.timestep_range
        if last * (1 - ROUNDING) <= t[0] <= first * (1 + ROUNDING):
            sides = transformer_options.get("cond_or_uncond", [0] * batched_number)
            latent = self._latent(x_noisy, cond.get("areas"), batched_number)
            controls += [Control(self.network, latent, self.strength, self.weights, rows)
                         for rows in self._rows(sides, len(x_noisy) // batched_number)]
        return Controls(controls) if controls else None

    def _rows(self, sides: list[int], per_side: int) -> list[slice | None]:
        """Which samples to steer: None for all, or each run of samples of the positive side."""
        if not self.cond_only or not any(sides):
            return [None]
        rows, start = [], 0
        for side, run in itertools.groupby(sides):
            stop = start + len(list(run)) * per_side
            if side == 0:
                rows.append(slice(start, stop))
            start = stop
        return rows

    def _latent(self, x: Tensor, areas: tuple[Area, ...] | None, chunks: int) -> Tensor:
        """The hint's latent for x (B, 4, H, W): (B, 4, H, W), or (1, 4, H, W) when one serves all.

        Each chunk of the batch sees the part of the hint that lies where its area is.
        """
        rows, columns = x.shape[-2:]
        areas = areas or (Area((rows, columns), (0, 0)),) * chunks
        parts = []
        for whole, (top, left) in areas:
            latent = self._whole(whole, x.device)
            parts.append(latent[..., top: top + rows, left: left + columns])
        if len(parts[0]) == 1 and len(set(areas)) == 1:
            return parts[0]
        per_chunk = len(x) // chunks
        return torch.cat([comfy.utils.repeat_to_batch_size(part, per_chunk) for part in parts])

    def _whole(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """The hint's latent for a whole picture of `size`, encoded once in a run."""
        if size not in self._latents:
            self._latents[size] = self._encode(size).to(device)
        return self._latents[size]

    def _encode(self, size: tuple[int, int]) -> Tensor:
        hint = self.cond_hint_original
        hint = hint.expand(-1, 3, -1, -1) if hint.shape[1] == 1 else hint[:, :3]
        pixels = fit_image(hint.float(), size[0] * LATENT_PIXELS, size[1] * LATENT_PIXELS)
        loaded = comfy.model_management.loaded_models(only_currently_used=True)
        latent = self.vae.encode(pixels.movedim(1, -1))
        comfy.model_management.load_models_gpu(loaded)  # the VAE may have pushed them out
        if latent.ndim != 4 or latent.shape[1:] != (4, *size):
            raise ValueError(f"the VAE on the ControlNet gives latents of shape "
                             f"{tuple(latent.shape[1:])} for this picture, {(4, *size)} was "
                             "expected; wire the VAE of the PixArt model (SD 1.5's for alpha, "
                             "SDXL's for Sigma)")
        return self._scale(latent.float())

    def cleanup(self) -> None:
        """Called when sampling has ended: nothing of the run is kept."""
        super().cleanup()
        self._latents.clear()
        self._scale = None

    def get_models(self) -> list[comfy.model_patcher.ModelPatcher]:
        """What the host loads together with the model."""
        return [*super().get_models(), self.patcher]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Bytes of one set of residuals for a guidance batch of the hint's size.

        Controls add into one set, so a chain needs no more than its largest.
        """
        config = self.network.config
        pixels = self.cond_hint_original.shape[-2] * self.cond_hint_original.shape[-1]
        tokens = pixels // (LATENT_PIXELS * PATCH) ** 2
        own = 2 * config.depth * tokens * config.hidden_size * comfy.model_management.dtype_size(
            dtype)
        return max(own, super().inference_memory_requirements(dtype))


def load_control(path: str, dtype: torch.dtype | None = None) -> PixArtControl:
    """A CONTROL_NET from any PixArt ControlNet file or folder.

    `dtype` None lets the host choose for its device and the file. Raises CheckpointError that
    says what the file holds instead.
    """
    management = comfy.model_management
    opened = read_controlnet(path, {})
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(opened.state_dict),
            supported_dtypes=[torch.float16, torch.bfloat16, torch.float32],
            weight_dtype=comfy.utils.weight_dtype(opened.state_dict))
    # these layers follow the activations, whatever dtype the model they steer computes in
    network = PixArtControlNet(opened.config, dtype=dtype, device=offload_device,
                               operations=host_operations(comfy.ops.manual_cast)).eval()
    plain = comfy.model_patcher.ModelPatcher
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", plain)(
        network, load_device=load_device, offload_device=offload_device)
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        _map_weights(network, opened)
    else:
        assign_weights(network, opened, offload_device, copy=True, dtypes=weight_dtypes(network))
    logger.info("PixArt ControlNet: %d copied blocks of width %d, %s", opened.config.depth,
                opened.config.hidden_size, dtype)
    return PixArtControl(network, patcher)


def _map_weights(network: PixArtControlNet, opened: OpenedControlNet) -> None:
    """Leave the weights mapped to their file, which dynamic memory management pages from."""
    weights = {}
    for name, dtype in weight_dtypes(network).items():
        tensor = opened.state_dict[name]
        require_finite(name, tensor, opened.source)
        weights[name] = tensor.float() if dtype == torch.float32 else tensor
    network.load_state_dict(weights, strict=True, assign=True)


def check_control(path: str) -> None:
    """Raise CheckpointError when `path` is no usable PixArt ControlNet; reads headers only."""
    _check_once(path, fingerprint(path))


@functools.lru_cache(maxsize=32)
def _check_once(path: str, _fingerprint: str) -> None:
    read_controlnet(path, {})
