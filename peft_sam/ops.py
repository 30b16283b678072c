"""Products with W + Δ, Δ sparse, and their gradients. W is only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peft_sam.delta import SparseDelta

# A support that touches more than this share of the rows or columns of W is treated as touching all of them:
# gathering most of a matrix costs more than it saves.
ALL_OF_THEM = 0.5


def compose(parameter: Tensor, deltas: Sequence[SparseDelta]) -> Tensor:
    """θ + Δ₁ + Δ₂ + … as a new tensor of θ's shape and dtype; differentiable in θ and in the values of each Δ.

    Each sum is rounded to θ's dtype in turn, so the result has the bits that merging the deltas in this order
    gives. Gradient: ∂/∂values = (∂/∂θ).flatten()[indices].
    """
    flat = parameter.flatten()
    for delta in deltas:
        indices = delta.checked_indices()
        flat = flat.index_copy(0, indices, delta.changed(flat.index_select(0, indices)))
    return flat.view(parameter.shape)


class Plan(NamedTuple):
    """Where the support of one Δ of a linear layer lies: what its products need.

    rows, columns: the rows (outputs) and columns (inputs) of W that the support touches; None for all of them.
    local: for each entry its flat position in the (rows × columns) submatrix.
    """

    rows: Tensor | None
    columns: Tensor | None
    local: Tensor


def plan_linear(delta: SparseDelta, transposed: bool) -> Plan:
    """The plan of `delta` for a weight of shape (out, in), or (in, out) when `transposed`."""

    def make(indices: Tensor) -> Plan:
        width = delta.shape[1]
        first, second = indices // width, indices % width
        row_of, column_of = (second, first) if transposed else (first, second)
        outputs, inputs = (delta.shape[1], delta.shape[0]) if transposed else (delta.shape[0], delta.shape[1])
        rows, row_of = _active(row_of, outputs)
        columns, column_of = _active(column_of, inputs)
        return Plan(rows, columns, row_of * (inputs if columns is None else len(columns)) + column_of)

    delta.checked_indices()
    return delta.derive(("plan", transposed), make)


def _active(index_of: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
    """The distinct indices and each entry's position among them, or (None, the indices) when they are most of all."""
    active, position = torch.unique(index_of, return_inverse=True)
    return (None, index_of) if len(active) > ALL_OF_THEM * size else (active, position)


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[SparseDelta], transposed: bool
) -> Tensor:
    """y = x (W + Σ Δ)ᵀ + b for a frozen W of shape (out, in), or (in, out) when `transposed`.

    Args:
        x: (..., in), with at least one leading dimension.
        bias: (out,) or None; may require gradients.

    Gradients: dx = dy (W + Σ Δ); of each Δ's values (dyᵀ x) at its support, from the rows of dy and the columns of
    x that the support touches. Only those columns of x are saved. Under autocast the products are in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    parts: list[Tensor | None] = []
    for delta in deltas:
        parts += [delta.values, delta.indices, *plan_linear(delta, transposed)]
    with torch.autocast(x.device.type, enabled=False):
        return _SparseLinear.apply(x, weight, bias, transposed, *parts)


class _Part(NamedTuple):
    """One Δ as the op takes it."""

    values: Tensor
    indices: Tensor
    rows: Tensor | None
    columns: Tensor | None
    local: Tensor


def _parts(flat: Sequence[Any]) -> list[_Part]:
    size = len(_Part._fields)
    return [_Part(*flat[start : start + size]) for start in range(0, len(flat), size)]


class _SparseLinear(torch.autograd.Function):
    """`sparse_linear`; W + Σ Δ lives only inside a product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, *flat: Tensor | None
    ) -> Tensor:
        parts = _parts(flat)
        inputs = [_pick(x.flatten(0, -2), part.columns) for part in parts]
        ctx.transposed, ctx.number = transposed, len(flat)
        ctx.save_for_backward(weight, *flat, *inputs)
        return F.linear(x, _composed(weight, parts, transposed, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = ctx.saved_tensors
        parts, inputs = _parts(rest[: ctx.number]), rest[ctx.number :]
        needs_x, _, needs_bias, _, *needs = ctx.needs_input_grad
        flat_grad = grad.flatten(0, -2)
        grad_x = grad @ _composed(weight, parts, ctx.transposed, grad.dtype) if needs_x else None
        grad_bias = flat_grad.sum(0) if needs_bias else None
        grads: list[Tensor | None] = [None] * ctx.number
        size = len(_Part._fields)
        for position, (part, x) in enumerate(zip(parts, inputs, strict=True)):
            if needs[position * size]:
                small = _pick(flat_grad, part.rows).t() @ x
                grads[position * size] = small.flatten().index_select(0, part.local).to(part.values.dtype)
        return (grad_x, None, grad_bias, None, *grads)


def _pick(matrix: Tensor, columns: Tensor | None) -> Tensor:
    return matrix if columns is None else matrix.index_select(1, columns)


def _composed(weight: Tensor, parts: Sequence[_Part], transposed: bool, dtype: torch.dtype) -> Tensor:
    """W + Σ Δ, (out, in), of `dtype`; each sum is rounded to W's dtype, as in `compose`."""
    composed = weight.clone(memory_format=torch.contiguous_format)
    flat = composed.view(-1)
    for part in parts:
        entries = flat.index_select(0, part.indices)
        flat.index_copy_(0, part.indices, (entries.to(part.values.dtype) + part.values).to(flat.dtype))
    composed = composed.to(dtype)
    return composed.t() if transposed else composed
