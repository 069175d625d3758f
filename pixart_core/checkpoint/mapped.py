"""Giving back the memory of tensors that are mapped to a file."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Take the pages of file-mapped tensors out of this process's memory, where Linux can.

    A mapping keeps every page that was ever touched until its last tensor is gone, so that
    converting a file piece by piece would hold all of it. Only for mapped tensors that nobody has
    written to: their pages are read from the file again if they are ever needed.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    page = mmap.PAGESIZE
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        start = -(-tensor.data_ptr() // page) * page  # whole pages of this tensor only
        stop = (tensor.data_ptr() + tensor.nbytes) // page * page
        if stop > start:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
