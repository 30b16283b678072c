"""Slow, dense, obvious versions of what the package does: the oracles of the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


def dense_delta(delta: Any) -> Tensor:
    """Δ of a `SparseDelta` as a dense tensor."""
    dense = torch.zeros(delta.shape.numel(), dtype=delta.values.dtype, device=delta.values.device)
    dense[delta.indices] = delta.values.detach()
    return dense.view(delta.shape)


def adapted_copy(base: nn.Module, deltas: Mapping[str, Any], pairs: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of an unwrapped base model with every Δ, then every pair's α/r · B·A, added to its parameters, in the
    parameters' dtype.

    Args:
        pairs: by the name of the module.
    """
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameter = parameters[name]
            dense = dense_delta(delta)
            changed = (parameter.to(dense.dtype) + dense).to(parameter.dtype)
            parameter.copy_(torch.where(dense != 0, changed, parameter))
        for module, pair in (pairs or {}).items():
            weight, change = parameters[f"{module}.weight"], pair.lora_B @ pair.lora_A * (pair.alpha / pair.r)
            weight.copy_((weight.to(change.dtype) + (change.t() if pair.transposed else change)).to(weight.dtype))
    return model


def mean_loss_gradients(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    total_loss: Callable[[nn.Module, Any], Tensor],
    n: float,
) -> dict[str, Tensor]:
    """The gradient of (Σ total_loss(batch)) / n, by one backward pass through everything, in eval mode."""
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = sum(total_loss(model, batch) for batch in batches) / n
    parameters = dict(model.named_parameters())
    wanted = list(names)
    grads = torch.autograd.grad(loss, [parameters[name] for name in wanted], allow_unused=True)
    return {
        name: torch.zeros_like(parameters[name]) if grad is None else grad
        for name, grad in zip(wanted, grads, strict=True)
    }


def largest(scores: Mapping[str, Tensor], k: int) -> dict[str, list[int]]:
    """The k largest by sorting (−score, order of the tensors, flat position)."""
    entries = [
        (-float(value), order, position, name)
        for order, (name, tensor) in enumerate(scores.items())
        for position, value in enumerate(tensor.flatten().tolist())
    ]
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for _, _, position, name in sorted(entries)[:k]:
        chosen[name].append(position)
    return {name: sorted(positions) for name, positions in chosen.items()}


def budget(density: float, entries: int) -> int:
    """⌊p·m⌋ with p as its decimal digits say."""
    return int(Fraction(str(density)) * entries)
