"""What a process on a CPU does with the memory of tensors that are no longer needed."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """On a CPU, have the C library reuse freed memory, which it would return to the kernel and request anew each step.

    The process then keeps the memory of its peak until it ends. Nothing happens beside a GPU, where models pass through
    the memory only once, and with a C library that has no `mallopt`.
    """
    if sys.platform == "linux" and not torch.accelerator.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *setting: None)
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap,
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never returned
