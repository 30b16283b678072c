"""What the ways to compute a product cost on each kind of device: they decide between ways, never what comes out.

All numbers are in multiplications of a dense product on the same device, which `benchmarks/calibrate.py` measures: it
prints a row for `MEASURED`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Costs(NamedTuple):
    """What the parts of a product cost.

    move: a number of W read and written once.
    gather: a gathered, scattered or transposed row or column, per token.
    second_block: a second block's calls, per token: they are spread over some tokens.
    entry: an entry's product gathered and added on its own, per token.
    sampled: a sampled entry of the gradient, per token; None where torch samples none.
    few_tokens, large: so few tokens with so large a weight are multiplied entry by entry, and all others with a copy of
        W + Δ, where a copy brings W into the cache, where the product wants it; None where copies gain nothing.
    """

    move: int
    gather: int
    second_block: int
    entry: int
    sampled: int | None = None
    few_tokens: int | None = None
    large: int = 0


# Two cores, AVX-512, float32. (One token, weights of 576 x 192 whose memory went through the cache meanwhile: 130
# microseconds more than the bare layer by copies, 50 by entries.)
CPU = Costs(move=32, gather=64, second_block=4096, entry=160, sampled=16, few_tokens=4, large=2**14)

# NOT MEASURED. Arithmetic for an H100: 400 · 10¹² multiplications a second in bfloat16 and 3 TB/s make a byte moved 133
# of them. A number moved is four bytes, one gathered or scattered eight, an entry some 30; a second block ten
# microseconds of calls over 4,096 tokens. Rather too high than too low: where it is close, calls are few and plain.
CUDA = Costs(move=512, gather=1024, second_block=2**20, entry=4096)

# Devices by the name that torch gives them, from `benchmarks/calibrate.py`; none so far.
MEASURED: dict[str, Costs] = {}


@functools.cache
def costs_of(device: torch.device) -> Costs:
    """The row for a device: its own if it was measured, else that of its kind."""
    if device.type == "cpu":
        return CPU
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""
    return MEASURED.get(name, CUDA)
