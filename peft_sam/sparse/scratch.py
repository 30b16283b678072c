"""Memory for tensors that live no longer than one product."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(numbers: int, like: Tensor) -> Tensor:
    """A flat tensor of so many numbers of the dtype and device of `like`; its content is anything.

    On the CPU each thread uses the same memory again and again: it is in the cache when it is needed, while fresh
    memory would have to be mapped first. Other devices have caching allocators that know about streams.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(numbers, dtype=like.dtype, device=like.device)
    size = numbers * like.element_size()
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _kept.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    return buffer[:size].view(like.dtype)
