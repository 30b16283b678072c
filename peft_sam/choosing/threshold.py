"""Which k entries win: the exact k-th largest score over many tensors, without gathering or sorting them.

For non-negative float32 numbers the bit pattern read as an integer keeps the order. A histogram of the upper 16
bits finds the bin of the k-th largest, one of the lower 16 bits inside that bin finds the number itself. -1 marks an
entry that is never to win, whatever k: one whose score is NaN, or that has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from peft_sam.choosing.processes import Processes

BINS = 1 << 16
NEVER = -1
INFINITE = int(torch.tensor(torch.inf).view(torch.int32))


def budget_of(density: float, entries: int) -> int:
    """⌊p·m⌋ for the density as written: 0.29 of 100 entries is 29, where floating point would give 28."""
    return int(Fraction(str(density)) * entries)


def bits_of(scores: Tensor) -> Tensor:
    """Non-negative scores of any float dtype as order-preserving int32; NaN is never to win."""
    # + 0.0 turns a negative zero into a positive one
    flat = scores.flatten().to(torch.float32) + 0.0
    return flat.view(torch.int32).masked_fill_(flat.isnan(), NEVER)


def kth_largest(chunks: Callable[[], Iterable[Tensor]], k: int, sharing: Processes | None = None) -> tuple[int, int]:
    """The bits of the k-th largest score, and how many scores are larger; `NEVER` if fewer than k may win.

    Args:
        chunks: gives the scores anew at each call, as int32 bits in pieces of any size.
        k: between 1 and the number of scores.
        sharing: the processes that hold the scores, if this one holds a part: two sums of 65,536 counts.
    """
    upper, above = _bin_of(_histogram((bits >> 16 for bits in chunks()), sharing), k, 0)
    if upper == NEVER:
        return NEVER, above
    inside = (bits[(bits >> 16) == upper] & (BINS - 1) for bits in chunks())
    lower, above = _bin_of(_histogram(inside, sharing), k, above)
    return (upper << 16) | lower, above


def _histogram(values: Iterator[Tensor], sharing: Processes | None) -> Tensor:
    """How often each number from -1 on comes."""
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device="cpu")
    for value in values:
        counts += torch.bincount(value + 1, minlength=BINS + 1).cpu()
    return counts if sharing is None else sharing.sum(counts)


def _bin_of(counts: Tensor, k: int, above: int) -> tuple[int, int]:
    """The number in whose bin the k-th largest is, and how many scores are in higher bins, `above` included."""
    at_least = counts.flip(0).cumsum(0).flip(0) + above
    found = int((at_least >= k).nonzero()[-1])
    return found - 1, int(at_least[found] - counts[found])


def largest(
    bits: Mapping[str, Callable[[], Iterable[Tensor]]], k: int, sharing: Processes | None = None
) -> tuple[dict[str, Tensor], float]:
    """Positions of the k largest scores over several tensors, of fewer where fewer may win; the smallest such score.

    Ties are broken by (order of the tensors, process, flat position).

    Args:
        bits: name → chunks of the tensor's scores, as in `kth_largest`, in flat order.
        k: at most the number of scores.
        sharing: the processes that hold parts of these tensors, if they are sharded.

    Returns:
        name → sorted int64 positions in this process's part, on the CPU, k in all; the threshold as a number, infinite
        if nothing may win.
    """

    def every() -> Iterator[Tensor]:
        return (chunk for chunks in bits.values() for chunk in chunks())

    threshold, above = kth_largest(every, k, sharing) if k else (NEVER, 0)
    if threshold == NEVER:
        k = above
        threshold, above = kth_largest(every, k, sharing) if k else (INFINITE, 0)
    ties = k - above
    rooms = {} if sharing is None else _rooms(bits, threshold, ties, sharing)
    positions = {}
    for name, chunks in bits.items():
        ties = rooms.get(name, ties)
        found, start = [], 0
        for chunk in chunks():
            winners = chunk > threshold
            if ties:
                tied = (chunk == threshold).nonzero().flatten()[:ties]
                winners[tied] = True
                ties -= len(tied)
            found.append(winners.nonzero().flatten().cpu() + start)
            start += len(chunk)
        positions[name] = torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")
    return positions, float(torch.tensor(threshold, dtype=torch.int32).view(torch.float32))


def _rooms(
    bits: Mapping[str, Callable[[], Iterable[Tensor]]], threshold: int, ties: int, sharing: Processes
) -> dict[str, int]:
    """How many of this process's entries at the threshold win, per tensor."""
    mine = torch.tensor([sum(int((chunk == threshold).sum()) for chunk in chunks()) for chunks in bits.values()])
    counts = torch.stack(sharing.each(mine), dim=1)  # tensors × processes
    before = counts.flatten().cumsum(0).view_as(counts) - counts
    return dict(zip(bits, (ties - before).clamp(min=0).minimum(counts)[:, sharing.rank].tolist(), strict=True))
