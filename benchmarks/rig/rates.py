"""Learning rates of their own for the entries of a sparse adapter: smaller where the loss is more curved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_sam import SparseDelta
from peft_sam.layers.base import SamLayer

# A rate is at most so many times the geometric mean of all, and at least its inverse.
WIDEST = 50.0
# What stands for the logarithm of no curvature at all.
LEAST = -60.0


class Rates:
    """s ∝ h^(−power), of geometric mean 1 in each active adapter; h is the diagonal of the Kronecker-factored curvature
    (Martens and Grosse 2015, arXiv 1503.05671) of linear layers: E[x_j²] · E[δ_i²] of a weight and E[δ_i²] of a bias,
    over tokens.

    To AdamW it is Δ = s ⊙ v with v at the run's rate, but for the clipping of gradients and for its ε.
    """

    def __init__(self, model: Any, batches: Iterable[dict[str, Any]], number: int, power: float) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SamLayer)}
        with _second_moments(layers) as moments:
            model.eval()
            for batch in islice(batches, number):
                model(**batch).loss.backward()
        model.zero_grad()
        self._rates: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for adapter in model.base_model.active_adapters:
            deltas = [
                (moments[name], delta)
                for name, layer in layers.items()
                for delta in layer.deltas(adapter).values()
                if len(delta.values)
            ]
            found = [_logarithms(delta, *of) for of, delta in deltas]
            mean = torch.cat(found).mean()
            for (_, delta), logarithms in zip(deltas, found, strict=True):
                rates = torch.exp(-power * (logarithms - mean)).clamp(1 / WIDEST, WIDEST)
                self._rates.append((delta.values, rates, delta.values.detach().clone()))

    @torch.no_grad()
    def step(self) -> None:
        """After the optimizer's step: have each value take its share of it."""
        for values, rates, before in self._rates:
            values.copy_(before.add_(rates * (values - before)))


def _logarithms(delta: SparseDelta, inputs: Tensor, outputs: Tensor) -> Tensor:
    """log h of each entry."""
    width = delta.shape[1] if len(delta.shape) == 2 else 1
    found = outputs[delta.indices // width].log()
    if len(delta.shape) == 2:
        found = found + inputs[delta.indices % width].log()
    return found.clamp(min=LEAST)


@contextmanager
def _second_moments(layers: Mapping[str, SamLayer]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name → sums over tokens of the squares of a layer's inputs and of its outputs' gradients."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()

            def arrived(grad: Tensor) -> None:
                squares = [rows.flatten(0, -2).square().sum(0) for rows in (x, grad)]
                before = found.get(name, (torch.zeros(()), torch.zeros(())))
                found[name] = (before[0] + squares[0], before[1] + squares[1])

            if output.requires_grad:  # else no entry is here or below
                output.register_hook(arrived)

        return hook

    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
