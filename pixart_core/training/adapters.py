"""Low-rank adapters on a transformer, through peft, and the file they are handed out in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.lora_export import host_tensors, write_host_lora
from ..checkpoint.lora_layer import LoRA, LoRALayer
from ..extras import require
from ..model import PixArtTransformer

ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear",
             "cross_attn.proj")
BLOCK = (*ATTENTION, "mlp.fc1", "mlp.fc2")
# the modules that PixArt-delta's LCM-LoRA is trained on; tables are no layers and stay
EVERYWHERE = (*BLOCK, "x_embedder.proj", "final_layer.linear", "t_embedder.mlp.0",
              "t_embedder.mlp.2", "y_proj.fc1", "y_proj.fc2")
TARGETS = {"attention": ATTENTION, "blocks": BLOCK, "everywhere": EVERYWHERE}

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


class Adapters(nn.Module):
    """The adapters of a model as a module of their own: their weights and nothing else.

    `model` gets new layers in place and stays frozen but for them; they change nothing until they
    are trained (B starts at zero).
    """

    def __init__(self, model: PixArtTransformer, targets: Sequence[str], rank: int,
                 alpha: float | None = None, seed: int = 0) -> None:
        super().__init__()
        peft = require("peft", "training a LoRA", extra="train")
        self.alpha = float(rank if alpha is None else alpha)
        config = peft.LoraConfig(r=rank, lora_alpha=self.alpha, target_modules=list(targets))
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
        # kept out of the module tree, where the model's own weights would come along
        self._adapted = {name: parameter for name, parameter in model.named_parameters()
                         if ".lora_" in name}
        for parameter in self._adapted.values():
            parameter.requires_grad_(True)

    def named_parameters(self, *args: Any, **kwargs: Any):
        """Names and weights of the adapters."""
        return iter(self._adapted.items())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The adapters' weights."""
        return {name: parameter.detach() for name, parameter in self._adapted.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True,
                        assign: bool = False) -> None:
        """Put weights back; raises ValueError for other names or shapes."""
        if state_dict.keys() != self._adapted.keys():
            raise ValueError("the adapters are on other layers than those of the checkpoint")
        for name, parameter in self._adapted.items():
            parameter.copy_(state_dict[name])

    def lora(self) -> LoRA:
        """The adapters in native terms."""
        layers = []
        for name, down in self._adapted.items():
            if name.endswith(_DOWN):
                target = name.removesuffix(_DOWN)
                tensors = {"down": down.detach().cpu().clone(),
                           "up": self._adapted[target + _UP].detach().cpu().clone()}
                rank = len(tensors["down"])
                layers.append(LoRALayer(f"{target}.weight", 0, 1, "lora", tensors,
                                        self.alpha / rank))
        return LoRA(tuple(layers))

    def write(self, path: Path) -> None:
        """A safetensors file that our loaders and ComfyUI's own apply alike."""
        write_host_lora(path, host_tensors(self.lora()))
