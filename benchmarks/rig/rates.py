"""Learning rates of their own for the entries of a sparse adapter: smaller where the loss is more curved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_sam import SamLayer

# A rate is at most so many times the geometric mean of all, and at least its inverse.
WIDEST = 50.0
# What stands for the logarithm of no curvature at all.
LEAST = -60.0


class Rates:
    """s ∝ h^(−power) with geometric mean 1, h_ij = E[x_j²] · E[δ_i²] over tokens: for a linear layer's weight the
    diagonal of its Kronecker-factored curvature (Martens and Grosse 2015, arXiv 1503.05671).

    To AdamW it is Δ = s ⊙ v with v at the run's rate, but for the clipping of gradients and for its ε.
    """

    def __init__(self, model: nn.Module, batches: Iterable[dict[str, Any]], number: int, power: float) -> None:
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SamLayer) and any(len(delta.values) for delta in module.deltas("default").values())
        }
        for name, layer in layers.items():
            for which, delta in layer.deltas("default").items():
                if which != "weight" or len(delta.shape) != 2:
                    raise ValueError(f"rates of entries are for the weights of linear layers; {name}.{which} is none.")
        with _second_moments(layers) as moments:
            model.eval()
            for batch in islice(batches, number):
                model(**batch).loss.backward()
        model.zero_grad()
        logarithms: list[tuple[nn.Parameter, Tensor]] = []
        for name, (inputs, outputs) in moments.items():
            delta = layers[name].deltas("default")["weight"]
            found = inputs[delta.indices % delta.shape[1]].log() + outputs[delta.indices // delta.shape[1]].log()
            logarithms.append((delta.values, found.clamp(min=LEAST)))
        mean = torch.cat([found for _, found in logarithms]).mean()
        self._rates = [
            (values, torch.exp(-power * (found - mean)).clamp(1 / WIDEST, WIDEST), values.detach().clone())
            for values, found in logarithms
        ]

    @torch.no_grad()
    def step(self) -> None:
        """After the optimizer's step: have each value take its share of it."""
        for values, rates, before in self._rates:
            values.copy_(before.add_(rates * (values - before)))


@contextmanager
def _second_moments(layers: dict[str, SamLayer]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name → sums over tokens of the squares of a layer's inputs and of its outputs' gradients."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()

            def arrived(grad: Tensor) -> None:
                squares = [rows.flatten(0, -2).square().sum(0) for rows in (x, grad)]
                before = found.get(name, (torch.zeros(()), torch.zeros(())))
                found[name] = (before[0] + squares[0], before[1] + squares[1])

            output.register_hook(arrived)

        return hook

    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
