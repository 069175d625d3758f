"""The bytes of every tensor that is alive, counted while a model runs without any memory.

On PyTorch's meta device tensors have shapes and no content. A dispatch mode sees each of them come,
and a weak reference to its storage says when it is gone: the peak is what a card would have to
hold, workspaces of comfy-kitchen's kernels among it, without its allocator's rounding, PyTorch's
own kernels' workspaces and the few hundred megabytes of CUDA.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .workspaces import workspace_of


class LiveBytes(TorchDispatchMode):
    """While active: the most bytes that tensors made since it began held at a time, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # a weak reference keeps the address of a storage from being given to another one
        self._older: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._kept: dict[Hashable, int] = {}

    @property
    def now(self) -> int:
        """Bytes of what was made and is still alive."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(size for _, size in self._made.values()) + sum(self._kept.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note_older(tensor)
        out = function(*args, **kwargs)
        workspace = workspace_of(function, args, kwargs)
        self._kept.update(workspace.kept)
        note = self._note_older if workspace.returned else self._note_made
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                note(tensor)
        self.peak = max(self.peak, self.now + workspace.passing)
        return out

    def _note_older(self, tensor: Tensor) -> None:
        """A storage that was there before, or that something else counts."""
        reference = StorageWeakRef(tensor.untyped_storage())
        if not self._is_known(reference):
            self._older[reference.cdata] = reference

    def _note_made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if not self._is_known(reference):
            self._made[reference.cdata] = reference, storage.nbytes()

    def _is_known(self, reference: StorageWeakRef) -> bool:
        return reference.cdata in self._older or reference.cdata in self._made


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers; what two names share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(storages.values())


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What a fused attention kernel allocates: its output and a float32 for each query and head."""
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1])
