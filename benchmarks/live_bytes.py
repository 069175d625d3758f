"""The bytes of every tensor that is alive, counted while a model runs without any memory.

On PyTorch's meta device tensors have shapes and no content. A dispatch mode sees each of them come,
and a weak reference to its storage says when it goes: the peak is what a card would have to hold,
without its allocator's rounding, kernels' own workspaces and the few hundred megabytes of CUDA.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While active: `now` bytes of tensors made since it began, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs or {})):
            if isinstance(tensor, Tensor):
                self._seen.add(tensor.untyped_storage()._cdata)  # made before, or counted already
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers; what two names share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(storages.values())


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What a fused attention kernel allocates: its output and a float32 for each query and head."""
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1])
