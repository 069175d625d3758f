"""What comfy-kitchen's formats have in common: checks of a layer's tensors, and the way to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .kitchen import Backend, backend_for, dtype_name, require_kitchen, say_once
from .stored import StoredWeight, Tensors, WeightFormat

FULL_PRECISION = "full_precision_matrix_mult"
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


@dataclass(frozen=True)
class KitchenFormat(WeightFormat):
    """A format of comfy-kitchen for a weight of `shape` (out, in).

    `options` is the rest of what `comfy_quant` says in a file. With "full_precision_matrix_mult"
    activations are never quantised: the weight is unpacked for each product.
    """

    shape: torch.Size
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    name: ClassVar[str]
    functions: ClassVar[tuple[str, ...]]
    # tensors beside "weight", without the bias: name -> the dtypes it may have
    parts: ClassVar[Mapping[str, tuple[torch.dtype, ...]]]
    known_options: ClassVar[tuple[str, ...]] = ()
    capability: ClassVar[tuple[int, int]] = (0, 0)  # of NVIDIA cards that `runs_on` asks for
    kernel_dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS  # of activations; else unpacked

    @classmethod
    def read(cls, layer: str, tensors: Tensors, options: Mapping[str, Any]) -> StoredWeight:
        """The weight of `layer` from the tensors of a file; ValueError says what is wrong."""
        wanted = ("weight", *cls.parts)
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ValueError(f"{layer} says {cls.name!r} and lacks {layer}.{missing[0]}; the file "
                             "is incomplete, quantise or download it again")
        for name, dtypes in cls.parts.items():
            if tensors[name].dtype not in dtypes:
                raise ValueError(f"{layer}.{name} is {tensors[name].dtype}; {cls.name} has "
                                 f"{' or '.join(map(str, dtypes))} there")
        unknown = [key for key in options
                   if key not in (*cls.known_options, FULL_PRECISION, "format")]
        if unknown:
            raise ValueError(f"{layer} is {cls.name} with {unknown[0]}={options[unknown[0]]!r}, "
                             "which is not supported here; quantise the original file with: "
                             "pixart quantize")
        return cls.opened(layer, {name: tensors[name] for name in wanted}, dict(options))

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        """The rest of `read`: shapes, and options that change the tensors."""
        raise NotImplementedError

    def comfy_quant(self) -> dict[str, Any]:
        return {"format": self.name, **self.options}

    @property
    def full_precision(self) -> bool:
        return bool(self.options.get(FULL_PRECISION, False))

    def kitchen(self) -> ModuleType:
        """comfy_kitchen; ImportError where it is missing or too old for this format."""
        return require_kitchen(self.name, self.functions)

    def backend(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Backend:
        """What runs this layer on a device for activations of `dtype`, None for any, and why not
        something faster."""
        if self.full_precision:
            return Backend("unpacked", "the file asks for products in full precision")
        return backend_for(self.name, self.functions, device, dtype)

    def runner(self, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
        try:
            backend = self.backend(device, dtype)
        except ImportError as error:
            return str(error)
        if self.full_precision:
            return str(backend)
        if dtype is not None and dtype not in self.kernel_dtypes:
            return (f"unpacked for each product (its kernels take 16 bits, the model computes in "
                    f"{dtype_name(dtype)})")
        if self.runs_on(torch.device(device), dtype or self.kernel_dtypes[0]):
            return str(backend)
        needed = ".".join(map(str, self.capability))
        return (f"unpacked for each product by {backend.name} (its kernels need an NVIDIA card of "
                f"compute capability {needed} or higher)")

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        # kernels have no gradient: what trains through a quantised layer sees the dense weight
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if self.full_precision or needs_gradient or not self.runs_on(x.device, x.dtype):
            return F.linear(x, self.dense(tensors, x.dtype), self.dense_bias(tensors, bias))
        return self.product(x, tensors, bias)

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `product` is the better choice for activations of `dtype` on a device; logs
        once where it is not."""
        return True

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        """The layer through comfy-kitchen."""
        raise NotImplementedError


def require_kernels(weights: Mapping[str, StoredWeight]) -> None:
    """ImportError where comfy-kitchen, which runs these weights, is missing or too old."""
    forms = {weight.packing: weight.format for weight in weights.values()
             if isinstance(weight.format, KitchenFormat) and not weight.format.full_precision}
    for form in forms.values():
        form.kitchen()


def require_shape(layer: str, name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]],
                  what: str) -> None:
    """ValueError unless `tensor` has one of `shapes`."""
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{layer}.{name} has shape {tuple(tensor.shape)}; {what} has "
                         f"{' or '.join(map(str, shapes))}")


def require_weight(layer: str, weight: Tensor, dtype: torch.dtype, name: str) -> None:
    """ValueError unless `weight` is a matrix of `dtype`."""
    if weight.dtype != dtype or weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{layer}.weight is {weight.dtype} of shape {tuple(weight.shape)}; "
                         f"{name} stores a matrix of {dtype}")


def card_has(format_name: str, device: torch.device, dtype: torch.dtype,
             capability: tuple[int, int]) -> bool:
    """Whether `device` is an NVIDIA card of at least `capability` and `dtype` has 16 bits; says
    once what happens where not."""
    if dtype not in HALVES:  # the product of the card has no float32 output
        say_once(f"{format_name} weights are unpacked for each product in {dtype_name(dtype)}: "
                 "their kernels take 16 bits")
        return False
    # AMD's cards are "cuda" to PyTorch too, and have numbers of their own: gfx1100 is (11, 0)
    nvidia = device.type == "cuda" and torch.version.hip is None
    if nvidia and torch.cuda.get_device_capability(device) >= capability:
        return True
    say_once(f"{format_name} weights are unpacked for each product: their kernels need an NVIDIA "
             f"card of compute capability {capability[0]}.{capability[1]} or higher")
    return False
