"""Products with W + Δ, Δ sparse, and their gradients. W is only read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peft_sam.sparse.delta import SparseDelta, changed
from peft_sam.sparse.plan import Chunk, Plan, plan_linear, way_to_multiply
from peft_sam.sparse.products import add_blocks, add_blocks_adjoint, add_entries, add_sparse, value_gradient
from peft_sam.sparse.scratch import scratch


def compose(parameter: Tensor, deltas: Sequence[SparseDelta]) -> Tensor:
    """θ + Δ₁ + Δ₂ + … as a new tensor of θ's shape and dtype; differentiable in θ and in the values of each Δ.

    Each sum is rounded to θ's dtype in turn, so the result has the bits that merging the deltas in this order
    gives. Gradient: ∂/∂values = (∂/∂θ).flatten()[indices].
    """
    flat = parameter.flatten()
    for delta in deltas:
        indices = delta.checked_indices()
        flat = flat.index_copy(0, indices, changed(flat.index_select(0, indices), delta.values))
    return flat.view(parameter.shape)


class DenseGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is made dense where it comes sparse, as of an embedding with sparse=True."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same numbers."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient, dense."""
        return grad.to_dense() if grad.is_sparse else grad


def sparse_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deltas: Sequence[SparseDelta],
    bias_deltas: Sequence[SparseDelta],
    transposed: bool,
) -> Tensor:
    """y = x (W + Σ Δ)ᵀ + b + Σ δ for a frozen W of shape (out, in), or (in, out) when `transposed`.

    Args:
        x: (..., in), with at least one leading dimension.
        weight: W, or None for a product with Σ Δ alone.
        bias: (out,) or None; may require gradients.
        deltas: of W, at least one.
        bias_deltas: of b; empty without one.

    Many tokens are multiplied with W + Σ Δ, composed for the moment of the product; fewer with W, and the products
    with Δ are added (`way_to_multiply`). Gradients: dx in the same way; of each Δ's values (dyᵀ x) at its support,
    in the form of its plan. Only what that form needs of x is saved. Under autocast the products are in its dtype.
    """
    every = (*deltas, *bias_deltas)
    places, values = [delta.checked_indices() for delta in every], [delta.values for delta in every]
    plans = [plan_linear(delta, transposed) for delta in deltas]
    # flattened and viewed out here: what a Function returns may be changed in place only if it is no view
    tokens = x.flatten(0, -2).to(product_dtype(x, x.dtype))
    with _no_autocast(x):
        if torch.is_grad_enabled():
            y = _SparseLinear.apply(tokens, weight, bias, plans, places, *values)
        else:
            y = _linear(tokens, weight, bias, plans, [None] * len(plans), places, values)
    return y.view(*x.shape[:-1], y.shape[1])


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a product with x is computed in: autocast's dtype, or `dtype` without, and of float64, which it leaves."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Has products be computed in the dtypes of their factors."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _SparseLinear(torch.autograd.Function):
    """`sparse_linear` for x of shape (tokens, in); W + Σ Δ lives only inside a product."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        plans: Sequence[Plan],
        places: Sequence[Tensor],
        *values: Tensor,
    ) -> Tensor:
        number = len(plans)
        ctx.plans, ctx.places = plans, places
        needed = ctx.needs_input_grad[5:]
        kept = [plan.keep(tokens) if need else None for plan, need in zip(plans, needed[:number], strict=True)]
        ctx.save_for_backward(weight, *values, *kept)
        return _linear(tokens, weight, bias, plans, kept, places, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plans, places, number = ctx.plans, ctx.places, len(ctx.plans)
        weight, *saved = ctx.saved_tensors
        values, kept = saved[: len(places)], saved[len(places) :]
        needs_x, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        with _no_autocast(grad):
            grad_x = _adjoint(grad, weight, plans, places, values) if needs_x else None
            grads: list[Tensor | None] = [
                None if x is None else value_gradient(plan, x, grad, value.dtype)
                for plan, x, value in zip(plans, kept, values[:number], strict=True)
            ]
        grad_bias = grad.sum(0) if needs_bias or any(needs[number:]) else None
        for place, value, need in zip(places[number:], values[number:], needs[number:], strict=True):
            grads.append(grad_bias.index_select(0, place).to(value.dtype) if need else None)  # type: ignore[union-attr]
        return (grad_x, None, grad_bias if needs_bias else None, None, None, *grads)


def _linear(
    tokens: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    plans: Sequence[Plan],
    kept: Sequence[Tensor | None],
    places: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """x (W + Σ Δ)ᵀ + b + Σ δ; the places and values of W come before those of b."""
    transposed, way = plans[0].transposed, way_to_multiply(plans, len(tokens), weight)
    if bias is not None:
        if len(places) > len(plans):
            bias = bias.clone()
        for place, value in zip(places[len(plans) :], values[len(plans) :], strict=True):
            _add(bias, place, value)
        bias = bias.to(tokens.dtype)
    if way == "compose":
        parts = _composed(weight, plans, places, values, tokens.dtype)
        return _summed(tokens, parts, bias) if transposed else _split(tokens, parts, plans[0].shape[0], bias)
    if weight is None:
        y = tokens.new_zeros(len(tokens), plans[0].shape[1 if transposed else 0])
    else:
        y = F.linear(tokens, (weight.t() if transposed else weight).to(tokens.dtype), bias)
    for plan, columns, value in zip(plans, kept, values, strict=False):
        if way == "entries":
            add_sparse(y, tokens, plan, value)
        else:
            add_blocks(y, plan, plan.keep(tokens) if columns is None else columns, value)
    return y


def _adjoint(
    grad: Tensor, weight: Tensor | None, plans: Sequence[Plan], places: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """grad (W + Σ Δ)."""
    transposed, way = plans[0].transposed, way_to_multiply(plans, len(grad), weight)
    if way == "compose":
        parts = _composed(weight, plans, places, values, grad.dtype)
        return _split(grad, parts, plans[0].shape[0], None) if transposed else _summed(grad, parts, None)
    if weight is None:
        x = grad.new_zeros(len(grad), plans[0].shape[0 if transposed else 1])
    else:
        x = grad @ (weight.t() if transposed else weight).to(grad.dtype)
    for plan, value in zip(plans, values, strict=False):
        if way == "entries":
            add_entries(x, grad, plan.column, plan.row, value)
        else:
            add_blocks_adjoint(x, plan, grad, value)
    return x


def _composed(
    weight: Tensor | None, plans: Sequence[Plan], places: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[Chunk, Tensor]]:
    """W + Σ Δ of `dtype`, one chunk of the workspace's size at a time; sums are rounded as in `compose`."""
    whole, width, like = len(plans[0].chunks) == 1, plans[0].shape[1], values[0] if weight is None else weight
    # of another dtype than W's is under autocast: then one Δ needs no copy of W in its own
    in_dtype = weight is not None and len(plans) == 1
    for number, chunk in enumerate(plans[0].chunks):
        own = weight if whole or weight is None else weight[chunk.start : chunk.stop]
        flat = scratch((chunk.stop - chunk.start) * width, dtype if in_dtype else like.dtype, like.device)
        part = flat.view(-1, width)
        if own is None:
            part.zero_()
        else:
            part.copy_(own)
        for plan, place, value in zip(plans, places, values, strict=False):
            if not whole:
                entries = slice(plan.chunks[number].low, plan.chunks[number].high)
                place, value = place[entries] - chunk.start * width, value[entries]
            _add(flat, place, value, flat if own is None or flat.dtype == own.dtype else own.flatten())
        yield chunk, part.to(dtype)


def _add(entries: Tensor, place: Tensor, values: Tensor, own: Tensor | None = None) -> None:
    """Add Δ to a copy of a flat parameter, with the bits of `changed`.

    A GPU adds by atomic operations, which take subnormal numbers for zeros: not there.

    Args:
        own: the parameter itself, where the copy is in another dtype: sums are rounded to the parameter's first.
    """
    own = entries if own is None else own
    if values.dtype == entries.dtype == own.dtype and entries.device.type == "cpu":
        entries.index_add_(0, place, values)
    else:
        entries.index_copy_(0, place, changed(own.index_select(0, place), values).to(entries.dtype))


def _split(tokens: Tensor, parts: Iterator[tuple[Chunk, Tensor]], rows: int, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, from chunks of W's rows."""
    y = tokens.new_empty(len(tokens), rows)
    for chunk, part in parts:
        columns = y[:, chunk.start : chunk.stop]
        if bias is None:
            torch.mm(tokens, part.t(), out=columns)
        else:
            torch.addmm(bias[chunk.start : chunk.stop], tokens, part.t(), out=columns)
    return y


def _summed(tokens: Tensor, parts: Iterator[tuple[Chunk, Tensor]], bias: Tensor | None) -> Tensor:
    """x W + b, from chunks of W's rows."""
    y: Tensor | None = None
    for chunk, part in parts:
        columns = tokens[:, chunk.start : chunk.stop]
        y = F.linear(columns, part.t(), bias) if y is None else y.addmm_(columns, part)
    assert y is not None
    return y
