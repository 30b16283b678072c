"""Where the support of one Δ lies in a linear layer's weight, and how its products are best computed.

Supports chosen by gradients are clustered: a few columns (inputs with outlying activations) hold most entries, the
others a few each. So the touched columns are split in two blocks, each with the rows that it needs, such that the
area of the blocks, and with it the work of a product, is smallest; one block where splitting gains nothing. Where a
support is scattered over the whole weight, the entries of the gradient are sampled one by one, or read from dense
products of a few rows of the weight at a time. What is cheapest is said by the `Costs` of the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_sam.sparse.costs import Costs, costs_of
from peft_sam.sparse.delta import SparseDelta

# More than this share of the rows or columns counts as all of them: gathering most of a matrix saves nothing.
MOST = 0.5

# A block so many times taller than wide is multiplied as its transpose, which keeps the long side contiguous.
TALL = 2

# Numbers in a temporary dense copy of a weight, its delta or its gradient: at most so many, or one row or column.
WORKSPACE = 2**24

# So many numbers fit in an int32.
INT32 = 2**31


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


class Chunk(NamedTuple):
    """Rows `start` to `stop` of the weight as it is stored, and the entries `low` to `high` that lie in them."""

    start: int
    stop: int
    low: int
    high: int


class Plan(NamedTuple):
    """How the products with one Δ of a weight W (outputs × inputs) are computed.

    form: how the gradient of the values is: "submatrix", "sampled" or "chunked".
    shape: of the weight as it is stored.
    transposed: whether it is stored as (inputs × outputs).
    costs: of the device.
    row, column: of each entry in W (int32).
    chunks: parts of the stored weight that fit the workspace.
    columns: the touched columns of W, sorted, but those of the first block first; None for all of them.
    blocks: of the submatrix form; else empty.
    order: puts the entries of the blocks, one block after the other, in the order of Δ; None for a single block.
    starts: where the entries of each stored row start, and their number last (int32), for torch's sparse products,
        which are for the CPU.
    area: multiplications, per token, of a product with the blocks.
    touched: rows and columns that such a product gathers or scatters.
    """

    form: str
    shape: torch.Size
    transposed: bool
    costs: Costs
    row: Tensor
    column: Tensor
    chunks: tuple[Chunk, ...]
    columns: Tensor | None = None
    blocks: tuple[Block, ...] = ()
    order: Tensor | None = None
    starts: Tensor | None = None
    area: int = 0
    touched: int = 0

    def keep(self, tokens: Tensor) -> Tensor:
        """What the gradient of the values needs of the inputs (tokens × inputs)."""
        return tokens if self.columns is None else tokens.index_select(1, self.columns)

    def __str__(self) -> str:
        if self.form != "submatrix":
            return self.form
        return "submatrix " + " + ".join(f"{block.height} x {block.stop - block.start}" for block in self.blocks)


def plan_linear(delta: SparseDelta, transposed: bool) -> Plan:
    """The plan of `delta` for a weight of shape (out, in), or (in, out) when `transposed`; made once per support."""
    kept: Plan = delta.derive(("plan", transposed), lambda of: make_plan(of, transposed))
    return kept


def make_plan(delta: SparseDelta, transposed: bool) -> Plan:
    """The plan with the cheapest of the three forms for the support of `delta`.

    Raises:
        ValueError: if it is no support of a matrix of this shape.
    """
    indices, shape = delta.checked_indices(), delta.shape
    first, second = indices // shape[1], indices % shape[1]
    row, column = (second, first) if transposed else (first, second)
    height, width = reversed(shape) if transposed else shape
    on_cpu, costs = indices.device.type == "cpu", costs_of(indices.device)
    starts = _starts(first, shape[0]) if on_cpu and len(indices) <= INT32 else None
    row_of, column_of = _narrow(row, height), _narrow(column, width)
    plan = Plan("chunked", shape, transposed, costs, row_of, column_of, _chunks(first, shape), starts=starts)
    columns, blocks, order = _blocks(row, column, height, width, costs)
    area = sum(block.height * (block.stop - block.start) for block in blocks)
    gathered = 0 if columns is None else len(columns)
    gathered += sum(0 if block.rows is None else block.height for block in blocks)
    forms = {"submatrix": area + costs.gather * gathered} if blocks else {}
    forms["chunked"] = shape.numel()
    if starts is not None and costs.sampled is not None:
        forms["sampled"] = costs.sampled * len(indices) + costs.gather * sum(shape)
    cheapest = min(forms, key=lambda form: forms[form])
    if cheapest == "submatrix":
        touched = blocks[-1].stop + sum(block.height for block in blocks)
        return plan._replace(form="submatrix", columns=columns, blocks=blocks, order=order, area=area, touched=touched)
    return plan._replace(form=cheapest)


def _narrow(positions: Tensor, below: int) -> Tensor:
    """Positions below a number in half the memory, where they fit."""
    return positions.int() if below <= INT32 else positions


def _starts(first: Tensor, rows: int) -> Tensor:
    with warnings.catch_warnings():  # torch says once per process that sparse tensors are in beta
        warnings.simplefilter("ignore")
        torch.zeros(1, 1, device="cpu").to_sparse_csr()
    return torch.searchsorted(first, torch.arange(rows + 1, device=first.device)).int()


def way_to_multiply(plans: Sequence[Plan], tokens: int, weight: Tensor | None) -> str:
    """The cheapest way to multiply so many tokens with W + Σ Δ, or with Σ Δ if there is no W to be read.

    "compose": with W + Σ Δ in a temporary copy.
    "entries": with W, and the products with the entries of each Δ are added one by one.
    "blocks": with W, and the products with the blocks of each Δ are added.

    Entries in one row are added in an order that varies on a GPU, from call to call, unless
    `torch.use_deterministic_algorithms(True)` asks for one; the other two ways always add in the same order.
    """
    costs, numel = plans[0].costs, plans[0].shape.numel()
    if weight is not None and costs.few_tokens is not None:
        return "entries" if tokens <= costs.few_tokens and weight.numel() >= costs.large else "compose"
    ways = {
        "compose": costs.move * numel + (tokens * numel if weight is None else 0),
        "entries": costs.entry * tokens * sum(len(plan.row) for plan in plans),
    }
    if all(plan.blocks for plan in plans):
        moved = sum(plan.area + tokens * plan.touched for plan in plans)
        ways["blocks"] = tokens * sum(plan.area for plan in plans) + costs.move * moved
    return min(ways, key=lambda way: ways[way])


def _chunks(first: Tensor, shape: torch.Size) -> tuple[Chunk, ...]:
    height = max(1, WORKSPACE // shape[1])
    starts = list(range(0, shape[0], height))
    lows = torch.searchsorted(first, torch.tensor(starts, device=first.device)).tolist()
    return tuple(
        Chunk(start, min(start + height, shape[0]), low, high)
        for start, low, high in zip(starts, lows, [*lows[1:], len(first)], strict=True)
    )


def _blocks(
    row: Tensor, column: Tensor, height: int, width: int, costs: Costs
) -> tuple[Tensor | None, tuple[Block, ...], Tensor | None]:
    """Columns, blocks and order of the submatrix form for entries at (row, column) of a (height × width) matrix.

    No blocks if they would be the whole of a matrix that the workspace does not hold.
    """
    columns, position, counts = torch.unique(column, return_inverse=True, return_counts=True)
    everywhere = torch.ones_like(row, dtype=torch.bool)
    if len(columns) > MOST * width:
        if height * width > WORKSPACE:
            return None, (), None
        return None, (_block(row, column, height, 0, width, everywhere),), None
    order = counts.argsort(descending=True, stable=True)
    heavy = _best_split(row, _ranks(order)[position], height, len(order), costs)
    # sorted within the blocks: gathering runs three times as fast in the order of memory
    order = torch.cat([order[:heavy].sort().values, order[heavy:].sort().values])
    rank = _ranks(order)[position]
    parts = [(0, heavy, rank < heavy), (heavy, len(order), rank >= heavy)]
    pieces = [piece for part in parts if part[0] < part[1] for piece in _pieces(row, rank, height, *part)]
    blocks = tuple(block for block, _ in pieces)
    sorting = None
    if len(blocks) > 1:
        sorting = _narrow(torch.cat([inside.nonzero().flatten() for _, inside in pieces]).argsort(), len(row))
    return _narrow(columns[order], width), blocks, sorting


def _pieces(
    row: Tensor, column: Tensor, height: int, start: int, stop: int, inside: Tensor
) -> Iterator[tuple[Block, Tensor]]:
    """A block and which entries lie in it; if the workspace does not hold it, blocks of some of its columns each."""
    block = _block(row, column, height, start, stop, inside)
    if block.height * (stop - start) <= WORKSPACE or stop - start == 1:
        yield block, inside
        return
    width = max(1, WORKSPACE // block.height)
    for first in range(start, stop, width):
        last = min(first + width, stop)
        yield from _pieces(row, column, height, first, last, inside & (column >= first) & (column < last))


def _ranks(order: Tensor) -> Tensor:
    """The place of each number in a permutation."""
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks


def _block(row: Tensor, column: Tensor, height: int, start: int, stop: int, inside: Tensor) -> Block:
    row, column = row[inside], column[inside]
    rows: Tensor | None
    rows, row_of = torch.unique(row, return_inverse=True)
    if len(rows) > MOST * height:
        rows, row_of = None, row
    block_height, block_width = height if rows is None else len(rows), stop - start
    tall = block_height > TALL * block_width
    local = (column - start) * block_height + row_of if tall else row_of * block_width + column - start
    entries = None if bool(inside.all()) else _narrow(inside.nonzero().flatten(), len(inside))
    rows = None if rows is None else _narrow(rows, height)
    return Block(rows, block_height, start, stop, entries, _narrow(local, block_height * block_width), tall)


def _best_split(row: Tensor, rank: Tensor, height: int, width: int, costs: Costs) -> int:
    """How many of the columns, heaviest first, to put in a first block of their own; 0 for one block."""
    lowest = torch.full((height,), width, device=row.device).scatter_reduce(0, row, rank, "amin")
    highest = torch.full((height,), -1, device=row.device).scatter_reduce(0, row, rank, "amax")
    split = torch.arange(width + 1, device=row.device)

    def cost(rows: Tensor, columns: Tensor) -> Tensor:
        most = rows > MOST * height
        return torch.where(most, height * columns, rows * (columns + costs.gather)) * (columns > 0)

    in_first = torch.bincount(lowest, minlength=width + 1)[:width].cumsum(0)
    in_first = torch.cat([in_first.new_zeros(1), in_first])
    below = torch.bincount(highest + 1, minlength=width + 1).cumsum(0)
    work = cost(in_first, split) + cost(height - below[: width + 1], width - split)
    best = int(work.argmin())
    return best if work[best] + costs.second_block < work[0] else 0
