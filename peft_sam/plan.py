"""Where the support of one Δ lies in a linear layer's weight, and how its products are best computed.

Supports chosen by gradients are clustered: a few columns (inputs with outlying activations) hold most entries, the
others a few each. So the touched columns are split in two blocks, each with the rows that it needs, such that the
area of the blocks, and with it the work of a product, is smallest; one block where splitting gains nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_sam.delta import SparseDelta

# More than this share of the rows or columns counts as all of them: gathering most of a matrix saves nothing.
MOST = 0.5

# A block so many times taller than wide is multiplied as its transpose, which keeps the long side contiguous.
TALL = 2

# A gathered or scattered row costs as much as so many columns of a product (two CPU cores, AVX-512, float32).
GATHER = 64

# A second block costs as much, in calls, as so many entries of area.
SECOND_BLOCK = 4096


class Block(NamedTuple):
    """Some of the touched columns, with the rows that entries in these columns touch.

    rows: sorted rows of W, or None for all of them.
    height: how many rows.
    start, stop: which of the plan's columns.
    entries: which entries of Δ lie in the block, or None for all of them.
    local: for each of these entries its flat position in the block, stored as (columns × rows) if `tall`.
    tall: whether the block is much taller than wide.
    """

    rows: Tensor | None
    height: int
    start: int
    stop: int
    entries: Tensor | None
    local: Tensor
    tall: bool


class Plan(NamedTuple):
    """The blocks of one Δ.

    columns: the touched columns of W, those of the first block first; None for all of them.
    width: how many columns.
    order: puts the entries of the blocks, one block after the other, in the order of Δ; None for a single block.
    """

    columns: Tensor | None
    width: int
    blocks: tuple[Block, ...]
    order: Tensor | None = None

    @property
    def area(self) -> int:
        """Multiplications per token of a product with Δ."""
        return sum(block.height * (block.stop - block.start) for block in self.blocks)

    @property
    def touched(self) -> int:
        """Rows and columns per token that a product with Δ gathers or scatters."""
        return self.width + sum(block.height for block in self.blocks)

    def __str__(self) -> str:
        shapes = " + ".join(f"{block.height} x {block.stop - block.start}" for block in self.blocks)
        return f"Plan({shapes})"


def plan_linear(delta: SparseDelta, transposed: bool) -> Plan:
    """The plan of `delta` for a weight of shape (out, in), or (in, out) when `transposed`; made once per support."""

    def make(indices: Tensor) -> Plan:
        first, second = indices // delta.shape[1], indices % delta.shape[1]
        if transposed:
            return _plan(second, first, delta.shape[1], delta.shape[0])
        return _plan(first, second, delta.shape[0], delta.shape[1])

    delta.checked_indices()
    return delta.derive(("plan", transposed), make)


def _plan(row: Tensor, column: Tensor, height: int, width: int) -> Plan:
    """The plan for entries at (row, column) of a (height × width) matrix."""
    columns, position, counts = torch.unique(column, return_inverse=True, return_counts=True)
    everywhere = torch.ones_like(row, dtype=torch.bool)
    if len(columns) > MOST * width:
        return Plan(None, width, (_block(row, column, height, 0, width, everywhere),))
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    rank = rank[position]
    heavy = _best_split(row, rank, height, len(order))
    parts = [(0, heavy, rank < heavy), (heavy, len(order), rank >= heavy)]
    blocks = tuple(_block(row, rank, height, *part) for part in parts if part[0] < part[1])
    sorting = None
    if len(blocks) > 1:
        sorting = torch.cat([inside.nonzero().flatten() for _, _, inside in parts]).argsort()
    return Plan(columns[order], len(order), blocks, sorting)


def _block(row: Tensor, column: Tensor, height: int, start: int, stop: int, inside: Tensor) -> Block:
    row, column = row[inside], column[inside]
    rows: Tensor | None
    rows, row_of = torch.unique(row, return_inverse=True)
    if len(rows) > MOST * height:
        rows, row_of = None, row
    block_height, block_width = height if rows is None else len(rows), stop - start
    tall = block_height > TALL * block_width
    local = (column - start) * block_height + row_of if tall else row_of * block_width + column - start
    entries = None if bool(inside.all()) else inside.nonzero().flatten()
    return Block(rows, block_height, start, stop, entries, local, tall)


def _best_split(row: Tensor, rank: Tensor, height: int, width: int) -> int:
    """How many of the columns, heaviest first, to put in a first block of their own; 0 for one block."""
    lowest = torch.full((height,), width, device=row.device).scatter_reduce(0, row, rank, "amin")
    highest = torch.full((height,), -1, device=row.device).scatter_reduce(0, row, rank, "amax")
    split = torch.arange(width + 1, device=row.device)

    def cost(rows: Tensor, columns: Tensor) -> Tensor:
        most = rows > MOST * height
        return torch.where(most, height * columns, rows * (columns + GATHER)) * (columns > 0)

    in_first = torch.bincount(lowest, minlength=width + 1)[:width].cumsum(0)
    in_first = torch.cat([in_first.new_zeros(1), in_first])
    below = torch.bincount(highest + 1, minlength=width + 1).cumsum(0)
    work = cost(in_first, split) + cost(height - below[: width + 1], width - split)
    best = int(work.argmin())
    return best if work[best] + SECOND_BLOCK < work[0] else 0
