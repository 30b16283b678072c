"""Products with W + Δ, Δ sparse, and their gradients. W is only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peft_sam.delta import SparseDelta, changed
from peft_sam.plan import Block, Plan, plan_linear

# Multiplications of a dense product that take as long as moving one number through memory.
PRODUCTS_PER_MOVE = 16


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


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[SparseDelta], transposed: bool
) -> Tensor:
    """y = x (W + Σ Δ)ᵀ + b for a frozen W of shape (out, in), or (in, out) when `transposed`.

    Args:
        x: (..., in), with at least one leading dimension.
        bias: (out,) or None; may require gradients.

    Two forms, by what moves less memory (`composes`): many tokens multiply with W + Σ Δ, composed for the moment of
    the product; few tokens multiply with W, and the product with Δ is added. Gradients: dx in the same form; of each
    Δ's values (dyᵀ x) at its support, from the rows of dy and the columns of x that the support touches. Only those
    columns of x are saved. Under autocast the products are in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    plans = tuple(plan_linear(delta, transposed) for delta in deltas)
    places = tuple(delta.indices for delta in deltas)
    with torch.autocast(x.device.type, enabled=False):
        return _SparseLinear.apply(x, weight, bias, transposed, plans, places, *(delta.values for delta in deltas))


def composes(tokens: int, weight: Tensor, plans: Sequence[Plan]) -> bool:
    """Whether copying W moves less memory than gathering and adding the products with Δ, for so many tokens."""
    area = sum(plan.area for plan in plans)
    adding = tokens * (2 * sum(plan.touched for plan in plans) + area / PRODUCTS_PER_MOVE) + 2 * area
    return 2 * weight.numel() <= adding


class _SparseLinear(torch.autograd.Function):
    """`sparse_linear`; W + Σ Δ lives only inside a product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        plans: tuple[Plan, ...],
        places: tuple[Tensor, ...],
        *values: Tensor,
    ) -> Tensor:
        tokens = x.flatten(0, -2)
        inputs = [tokens if p.columns is None else tokens.index_select(1, p.columns) for p in plans]
        composed = composes(len(tokens), weight, plans)
        ctx.plans, ctx.places, ctx.transposed, ctx.composed = plans, places, transposed, composed
        if composed:
            ctx.save_for_backward(weight, *values, *inputs)
            return F.linear(x, _oriented(_composed(weight, values, places, x.dtype), transposed), bias)
        dense = [[_dense(block, value, x.dtype) for block in p.blocks] for p, value in zip(plans, values, strict=True)]
        ctx.save_for_backward(weight, *values, *inputs, *(block for blocks in dense for block in blocks))
        y = F.linear(tokens, _oriented(weight.to(x.dtype), transposed), bias)
        for plan, blocks, columns in zip(plans, dense, inputs, strict=True):
            for block, delta in zip(plan.blocks, blocks, strict=True):
                added = columns[:, block.start : block.stop] @ delta.t()
                y = y.add_(added) if block.rows is None else y.index_add_(1, block.rows, added)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = ctx.saved_tensors
        plans, number = ctx.plans, len(ctx.plans)
        values, inputs, dense = rest[:number], rest[number : 2 * number], iter(rest[2 * number :])
        needs_x, _, needs_bias, _, _, _, *needs = ctx.needs_input_grad
        tokens = grad.flatten(0, -2)
        picked = [
            [tokens if block.rows is None else tokens.index_select(1, block.rows) for block in plan.blocks]
            for plan in plans
        ]
        grad_x = None
        if needs_x and ctx.composed:
            grad_x = grad @ _oriented(_composed(weight, values, ctx.places, grad.dtype), ctx.transposed)
        elif needs_x:
            grad_x = tokens @ _oriented(weight.to(grad.dtype), ctx.transposed)
            for plan, rows in zip(plans, picked, strict=True):
                parts = [block_rows @ next(dense) for block_rows in rows]
                added = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
                grad_x = grad_x.add_(added) if plan.columns is None else grad_x.index_add_(1, plan.columns, added)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        grads = [
            _gradient(plan, rows, columns, value) if needed else None
            for plan, rows, columns, value, needed in zip(plans, picked, inputs, values, needs, strict=True)
        ]
        return (grad_x, None, tokens.sum(0) if needs_bias else None, None, None, None, *grads)


def _gradient(plan: Plan, picked: Sequence[Tensor], columns: Tensor, values: Tensor) -> Tensor:
    """(dyᵀ x) at the support: one small dense product per block, read at the entries' places."""
    found = []
    for block, rows in zip(plan.blocks, picked, strict=True):
        part = columns[:, block.start : block.stop]
        product = part.t() @ rows if block.tall else rows.t() @ part
        found.append(product.flatten().index_select(0, block.local))
    if plan.order is None:
        return found[0].to(values.dtype)
    return torch.cat(found).index_select(0, plan.order).to(values.dtype)


def _dense(block: Block, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The block of Δ as a dense (rows × columns) matrix."""
    inside = values if block.entries is None else values.index_select(0, block.entries)
    width = block.stop - block.start
    flat = inside.new_zeros(block.height * width).index_copy_(0, block.local, inside).to(dtype)
    return flat.view(width, block.height).t() if block.tall else flat.view(block.height, width)


def _composed(weight: Tensor, values: Sequence[Tensor], places: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """W + Σ Δ of `dtype`; each sum is rounded to W's dtype, as in `compose`."""
    composed = weight.clone(memory_format=torch.contiguous_format)
    flat = composed.view(-1)
    for value, indices in zip(values, places, strict=True):
        if value.dtype == flat.dtype:
            flat.index_add_(0, indices, value)
        else:
            flat.index_copy_(0, indices, changed(flat.index_select(0, indices), value))
    return composed.to(dtype)


def _oriented(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as (out, in)."""
    return weight.t() if transposed else weight
