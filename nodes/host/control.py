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
from ...pixart_core.model.controlnet import (
    Control,
    PixArtControlNet,
    check_fit,
    trained_for_another,
)
from ...pixart_core.quant.kitchen_format import require_kernels
from .conds import Area
from .files import fingerprint
from .model import residual_count, weight_dtypes
from .packed import PackedOperations, PackedPatcher, report_packed
from .transformer import WRONG_MODEL, Controls, HostInputs, host_operations

logger = logging.getLogger(__name__)

LATENT_PIXELS = 8
NO_VAE = ("a PixArt ControlNet needs the VAE of the model to encode its image: wire it to "
          "PixArt ControlNet Apply or Apply ControlNet")
# a percentage that names a step becomes that step's sigma only up to rounding; the next step is
# a hundred times as far away
ROUNDING = 1e-5


class HostControlNet(PixArtControlNet):
    """PixArtControlNet that tells the host's attention overrides which copy runs."""

    def run_copy(self, index: int, hidden: Tensor, inputs: HostInputs) -> Tensor:
        inputs.options["block_index"] = index
        return super().run_copy(index, hidden, inputs)


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
        if not hasattr(self, "multigpu_clones"):  # hosts before 0.23
            self.multigpu_clones: dict[torch.device, PixArtControl] = {}
        self._scale: Callable[[Tensor], Tensor] | None = None
        self._latents: dict[tuple[int, int], Tensor] = {}
        self._warned: set[str] = set()

    @property
    def residual_count(self) -> int:
        """Token tensors that this control adds."""
        return self.network.config.depth

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
        """Take the hint (B, C, H, W) in 0..1.

        Raises ValueError without a VAE, and for a range that ends before it starts.
        """
        if vae is None:
            raise ValueError(NO_VAE)
        start, end = timestep_percent_range
        if start > end:
            raise ValueError(f"start_percent is {start}, end_percent {end}: the ControlNet would "
                             "never steer; make the start the smaller one")
        super().set_cond_hint(cond_hint, strength, timestep_percent_range)
        self.vae = vae
        return self

    def pre_run(self, model: Any, percent_to_timestep_function: Callable) -> None:
        """Called when sampling starts; raises ValueError for a model this cannot steer."""
        config = getattr(model, "pixart_config", None)
        if config is None:
            raise ValueError(f"the model is a {type(model).__name__}: {WRONG_MODEL}")
        residual_count(self)
        if self.cond_hint_original is None:
            raise ValueError("the PixArt ControlNet has no image; apply it with PixArt ControlNet "
                             "Apply or Apply ControlNet")
        check_fit(self.network.config, config)
        # the host does not call `cleanup` when a run fails or is cancelled
        self._latents.clear()
        self._warn(trained_for_another(self.network.config, config))
        super().pre_run(model, percent_to_timestep_function)
        self._scale = model.latent_format.process_in  # not a method of the model, to let it go

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int,
                    transformer_options: dict[str, Any]) -> Controls | None:
        """What the model adds at noise level `t`: this control and those before it."""
        controls: list[Control] = []
        if self.previous_controlnet is not None:
            controls += self.previous_controlnet.get_control(
                x_noisy, t, cond, batched_number, transformer_options) or ()
        areas = cond.get("areas") or _whole_areas(x_noisy, transformer_options, batched_number)
        first, last = self.timestep_range
        if last * (1 - ROUNDING) <= t[0] <= first * (1 + ROUNDING):
            latent = self._latent(x_noisy, areas)
            controls += [Control(self.network, latent, self.strength, self.weights, rows)
                         for rows in self._rows(areas, len(x_noisy) // batched_number)]
        return Controls(controls) if controls else None

    def _rows(self, areas: tuple[Area, ...], size: int) -> list[slice | None]:
        """Which samples to steer: None for all, or each run of samples of the positive side."""
        if not self.cond_only or all(area.positive for area in areas):
            return [None]
        rows, start = [], 0
        for positive, run in itertools.groupby(area.positive for area in areas):
            stop = start + len(list(run)) * size
            if positive:
                rows.append(slice(start, stop))
            start = stop
        return rows

    def _latent(self, x: Tensor, areas: tuple[Area, ...]) -> Tensor:
        """The hint's latent for x (B, 4, H, W): (B, 4, H, W), or (1, 4, H, W) when one serves all.

        Each part of the batch sees the part of the hint that lies where its area is.
        """
        rows, columns = x.shape[-2:]
        parts = []
        for whole, (top, left), _ in areas:
            latent = self._whole(whole, x.device)
            parts.append(latent[..., top: top + rows, left: left + columns])
        if len(parts[0]) == 1 and len({area[:2] for area in areas}) == 1:
            return parts[0]
        size = len(x) // len(areas)
        if len(parts[0]) > size:
            self._warn(f"{len(parts[0])} control images for a batch of {size}: the last "
                       f"{len(parts[0]) - size} are not used")
        return torch.cat([comfy.utils.repeat_to_batch_size(part, size) for part in parts])

    def _whole(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """The hint's latent for a whole picture of `size`, encoded once in a run."""
        if size not in self._latents:
            self._latents[size] = self._encode(size).to(device)
        return self._latents[size]

    def _encode(self, size: tuple[int, int]) -> Tensor:
        hint = self.cond_hint_original
        if hint.shape[1] == 4:  # what is transparent is no line
            hint = hint[:, :3] * hint[:, 3:]
        hint = hint.expand(-1, 3, -1, -1)
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
        self._warned.clear()
        self._scale = None

    def _warn(self, message: str | None) -> None:
        """Log a warning once in a run."""
        if message and message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)

    def get_models(self) -> list[comfy.model_patcher.ModelPatcher]:
        """What the host loads together with the model."""
        return [*super().get_models(), self.patcher]


def _whole_areas(x: Tensor, options: dict[str, Any], parts: int) -> tuple[Area, ...]:
    """What to go by where the conditions of a call carry no areas: x is the whole latent."""
    sides = options.get("cond_or_uncond", [0] * parts)
    return tuple(Area(tuple(x.shape[-2:]), (0, 0), side == 0) for side in sides)


def load_control(path: str, dtype: torch.dtype | None = None) -> PixArtControl:
    """A CONTROL_NET from any PixArt ControlNet file or folder.

    `dtype` None lets the host choose for its device and the file. Raises CheckpointError that
    says what the file holds instead, and ImportError where what runs a quantised one is missing.
    """
    management = comfy.model_management
    opened = read_controlnet(path, {})
    require_kernels(opened.packed)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(opened.state_dict),
            supported_dtypes=[torch.float16, torch.bfloat16, torch.float32],
            weight_dtype=None if opened.packed else comfy.utils.weight_dtype(opened.state_dict))
    # these layers follow the activations, whatever dtype the model they steer computes in
    layers = PackedOperations if opened.packed else comfy.ops.manual_cast
    network = HostControlNet(opened.config, dtype=dtype, device=offload_device,
                             operations=host_operations(layers)).eval()
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = PackedPatcher if opened.packed else getattr(
        comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = patcher_class(network, load_device=load_device, offload_device=offload_device)
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        _map_weights(network, opened)
    else:
        assign_weights(network, opened, offload_device, copy=True, dtypes=weight_dtypes(network))
    logger.info("PixArt ControlNet: %d copied blocks of width %d, %s", opened.config.depth,
                opened.config.hidden_size, dtype)
    return PixArtControl(network, patcher)


def report_control(control: PixArtControl, node_id: str | None) -> str | None:
    """As `report_packed`, in the dtype that the ControlNet was loaded in: that of activations is
    the one of the model that it will steer."""
    dtype = control.network.controlnet[0].after_proj.weight.dtype
    return report_packed(control.network, control.patcher.load_device,
                         dtype if dtype.itemsize > 1 else None, node_id)


def _map_weights(network: PixArtControlNet, opened: OpenedControlNet) -> None:
    """Leave the weights mapped to their file, which dynamic memory management pages from."""
    weights = {}
    for name, dtype in weight_dtypes(network).items():
        tensor = opened.state_dict[name]
        require_finite(name, tensor, opened.source)
        weights[name] = tensor.float() if dtype == torch.float32 else tensor
    network.load_state_dict(weights, strict=True, assign=True)


def check_control(path: str) -> None:
    """Raise CheckpointError when `path` is no usable PixArt ControlNet, ImportError when nothing
    here runs it; reads headers only."""
    _check_once(path, fingerprint(path))


@functools.lru_cache(maxsize=32)
def _check_once(path: str, _fingerprint: str) -> None:
    require_kernels(read_controlnet(path, {}).packed)
