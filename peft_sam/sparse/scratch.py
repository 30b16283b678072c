"""Memory for tensors that live no longer than one product."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# So many numbers are kept for the next product at most; more, of many tokens, are worth new memory each time.
KEPT = 2**24

_kept = threading.local()


def scratch(numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of so many numbers; its content is anything.

    On the CPU each thread uses the same memory again and again: it is in the cache when it is needed, while fresh
    memory would have to be mapped first. Other devices have caching allocators that know about streams.
    """
    if device.type != "cpu" or numbers > KEPT or torch.compiler.is_compiling():
        return torch.empty(numbers, dtype=dtype, device=device)
    size = numbers * dtype.itemsize
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        if type(buffer) is Tensor:  # not the stand-in of a mode that only computes shapes
            _kept.buffer = buffer
    return buffer[:size].view(dtype)
