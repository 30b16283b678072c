"""A support in few bytes: the code in which adapter files hold sorted positions.

Of n positions in [0, N) the lowest b bits are kept as they are, one position after the other, and the rest, which never
decreases, in unary: bit (position >> b) + i is set for the i-th position (Elias 1974, Fano 1971). The two parts begin
at whole bytes, bits count from the lowest. b makes the code shortest, so n and N alone tell its length. At N = 200 n
that is 9.6 bits a position, where no code needs less than 9.1 if the support is random.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def code_length(entries: int, numel: int) -> int:
    """Bytes of the code of so many positions in a parameter of `numel` entries."""
    return sum(_layout(entries, numel)[1:])


def encode(indices: Tensor, numel: int) -> Tensor:
    """The code, uint8 and 1-D, of a support (`check_support`) in a parameter of `numel` entries."""
    positions = indices.detach().cpu().to(torch.int64).numpy()
    low_bits, _, high_bytes = _layout(len(positions), numel)
    bytes_of = positions.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)
    low = np.unpackbits(bytes_of[:, : -(-low_bits // 8)], axis=1, count=low_bits, bitorder="little")
    high = np.zeros(8 * high_bytes, dtype=np.bool_)
    high[(positions >> low_bits) + np.arange(len(positions))] = True
    return torch.from_numpy(np.concatenate([np.packbits(part, bitorder="little") for part in (low, high)]))


def decode(code: Tensor, entries: int, numel: int, name: str) -> Tensor:
    """The positions, int64 on the code's device; sorted by their high parts, but not yet checked to be a support.

    Raises:
        ValueError: if it is no code of so many positions in `numel`; `name` is the parameter.
    """
    low_bits, low_bytes, high_bytes = _layout(entries, numel)
    if code.dtype != torch.uint8 or tuple(code.shape) != (low_bytes + high_bytes,):
        raise ValueError(
            f"the coded support of {name!r} must have {low_bytes + high_bytes} bytes for {entries} of {numel} entries; "
            f"got shape {tuple(code.shape)}, {code.dtype}."
        )
    stored = code.detach().cpu().numpy()
    found = np.flatnonzero(np.unpackbits(stored[low_bytes:], bitorder="little"))
    if len(found) != entries:
        raise ValueError(f"the coded support of {name!r} has {len(found)} positions, not {entries}: it is damaged.")
    positions = ((found - np.arange(entries)) << low_bits).astype("<i8", copy=False)
    low = np.zeros((entries, 8 * -(-low_bits // 8)), dtype=np.uint8)
    bits = np.unpackbits(stored[:low_bytes], count=entries * low_bits, bitorder="little")
    low[:, :low_bits] = bits.reshape(entries, low_bits)
    bytes_of = np.packbits(low, bitorder="little").reshape(entries, -(-low_bits // 8))
    positions.view(np.uint8).reshape(-1, 8)[:, : bytes_of.shape[1]] |= bytes_of
    return torch.from_numpy(positions.astype(np.int64, copy=False)).to(code.device)


def _layout(entries: int, numel: int) -> tuple[int, int, int]:
    """The number of low bits, and the lengths of both parts in bytes."""
    layouts = [
        (bits, -(-entries * bits // 8), -(-(entries + (max(numel - 1, 0) >> bits)) // 8))
        for bits in range(max(numel, 1).bit_length())
    ]
    return min(layouts, key=lambda layout: layout[1] + layout[2])
