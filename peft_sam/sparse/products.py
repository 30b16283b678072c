"""Products with Δ alone, and the gradient of its values, in the forms that a plan can name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.plan import Block, Chunk, Plan, plan_linear
from peft_sam.sparse.scratch import scratch

# What torch's sparse products take on the CPU.
SPARSE_DTYPES = (torch.float32, torch.float64)


def value_gradient(plan: Plan, kept: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """(gradᵀ x) at the support, in `dtype`.

    Args:
        kept: `plan.keep(x)` of the inputs x (tokens × inputs).
        grad: of the outputs, (tokens × outputs).
    """
    form = plan.form
    if form == "sampled" and torch.compiler.is_compiling():
        form = "chunked"  # dense products are what a compiler knows
    return GRADIENTS[form](plan, kept, grad).to(dtype)


def add_sparse(y: Tensor, x: Tensor, plan: Plan, values: Tensor) -> None:
    """Add x Δᵀ to y, entry by entry."""
    starts, same = plan.starts, values.dtype == x.dtype and x.dtype in SPARSE_DTYPES
    if starts is not None and same and not plan.transposed and not torch.compiler.is_compiling():
        add_csr(y, x, torch.sparse_csr_tensor(starts, plan.column, values, plan.shape, check_invariants=False))
    else:
        add_entries(y, x, plan.row, plan.column, values)


def add_csr(y: Tensor, x: Tensor, delta: Tensor) -> None:
    """Add x Δᵀ to y, both with any leading dimensions, for a Δ in torch's compressed rows."""
    if x.numel() == x.shape[-1]:
        y.view(-1).addmv_(delta, x.reshape(-1))
    else:
        y.view(-1, y.shape[-1]).add_((delta @ x.reshape(-1, x.shape[-1]).t()).t())


def csr_of(delta: SparseDelta) -> Tensor | None:
    """Δ of a weight (outputs × inputs) in torch's compressed rows, or None where torch has none of its kind.

    It shares the memory of the values.
    """
    plan, values = plan_linear(delta, False), delta.values.detach()
    if plan.starts is None or values.dtype not in SPARSE_DTYPES:
        return None
    return torch.sparse_csr_tensor(plan.starts, plan.column, values, plan.shape, check_invariants=False)


def add_entries(y: Tensor, x: Tensor, row: Tensor, column: Tensor, values: Tensor) -> None:
    """Add x Δᵀ to y for a Δ with `values` at (row, column); the sum is in the dtype of the wider of both."""
    found = x.index_select(1, column) * values
    # half precision would round after each entry of a row
    sums = y if found.dtype == y.dtype else found.new_zeros(y.shape)
    sums.index_add_(1, row.long(), found)  # slow with int32
    if sums is not y:
        y.add_(sums)


def add_blocks(y: Tensor, plan: Plan, kept: Tensor, values: Tensor) -> None:
    """Add x Δᵀ to y, for `kept` = `plan.keep(x)`, block by block."""
    for block in plan.blocks:
        columns, delta = kept[:, block.start : block.stop], dense_block(block, values, kept.dtype)
        if block.rows is None:
            y.addmm_(columns, delta.t())
        else:
            y.index_add_(1, block.rows.long(), columns @ delta.t())


def add_blocks_adjoint(x: Tensor, plan: Plan, grad: Tensor, values: Tensor) -> None:
    """Add grad Δ to x, block by block."""
    for block in plan.blocks:
        rows = grad if block.rows is None else grad.index_select(1, block.rows)
        delta = dense_block(block, values, grad.dtype)
        if plan.columns is None:
            x.addmm_(rows, delta)
        else:
            x.index_add_(1, plan.columns[block.start : block.stop].long(), rows @ delta)


def dense_block(block: Block, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The block of Δ as a dense (rows × columns) matrix."""
    inside = values if block.entries is None else values.index_select(0, block.entries)
    width = block.stop - block.start
    flat = inside.new_zeros(block.height * width).index_copy_(0, block.local.long(), inside).to(dtype)
    return flat.view(width, block.height).t() if block.tall else flat.view(block.height, width)


def _within(plan: Plan, chunk: Chunk) -> Tensor:
    """The flat positions, in a chunk, of the entries that lie in it."""
    first, second = (plan.column, plan.row) if plan.transposed else (plan.row, plan.column)
    place = slice(chunk.low, chunk.high)
    return (first[place].long() - chunk.start) * plan.shape[1] + second[place]


def _by_submatrix(plan: Plan, kept: Tensor, grad: Tensor) -> Tensor:
    """One small dense product per block, read at the entries' places."""
    found = []
    for block in plan.blocks:
        rows = grad if block.rows is None else grad.index_select(1, block.rows)
        columns = kept if len(plan.blocks) == 1 else kept[:, block.start : block.stop]
        product = columns.t() @ rows if block.tall else rows.t() @ columns
        found.append(product.view(-1).index_select(0, block.local))
    return found[0] if plan.order is None else torch.cat(found).index_select(0, plan.order)


def _by_sampling(plan: Plan, kept: Tensor, grad: Tensor) -> Tensor:
    """Only the entries themselves; in single precision where torch samples none in the tensors' own."""
    left, right = (kept, grad) if plan.transposed else (grad, kept)
    dtype = kept.dtype if kept.dtype in SPARSE_DTYPES else torch.float32
    (tokens, rows), columns = left.shape, right.shape[1]
    # both as the product reads them, which would copy them otherwise, into memory that is new each time
    both = scratch(tokens * (rows + columns), dtype, kept.device).view(rows + columns, tokens)
    both[:rows].copy_(left.t())
    both[rows:].copy_(right.t())
    second = plan.row if plan.transposed else plan.column
    assert plan.starts is not None
    zeros = both.new_zeros(len(second))
    pattern = torch.sparse_csr_tensor(plan.starts, second, zeros, plan.shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, both[:rows], both[rows:].t(), beta=0.0).values()


def _by_chunks(plan: Plan, kept: Tensor, grad: Tensor) -> Tensor:
    """Dense products of some rows of the stored weight at a time, read at the entries' places."""
    left, right = (kept, grad) if plan.transposed else (grad, kept)
    found = [
        (left[:, chunk.start : chunk.stop].t() @ right).view(-1).index_select(0, _within(plan, chunk))
        for chunk in plan.chunks
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


# form of a plan → the gradient of the values, from what is kept of x and from the gradient of y
GRADIENTS: dict[str, Callable[[Plan, Tensor, Tensor], Tensor]] = {
    "submatrix": _by_submatrix,
    "sampled": _by_sampling,
    "chunked": _by_chunks,
}
