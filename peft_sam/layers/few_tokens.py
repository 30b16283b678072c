"""The product of a few tokens with W + Δ by the shortest way to it: calls are most of what it costs.

A weight of a language model passes through the cache between two calls of a layer, and drives out what the layer looks
up and runs. So little is looked up, once for a Δ, and in the modules' own dicts, which takes a tenth of the time of
their attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_sam.layers.owned import is_changed
from peft_sam.sparse.costs import costs_of
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.products import add_csr, csr_of


class _Found:
    """What was found of a Δ and the weight beside it.

    Attributes:
        weight: of the base layer.
        memory: of the values.
        csr: Δ in torch's compressed rows, sharing that memory; None where this is not the way to multiply.
        dtype: of all three.
        tokens: as many at most.
    """

    __slots__ = ("csr", "dtype", "memory", "tokens", "weight")

    def __init__(self, _: SparseDelta) -> None:
        self.weight: nn.Parameter | None = None
        self.memory, self.tokens = 0, 0
        self.csr: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def look(self, delta: SparseDelta, weight: nn.Parameter) -> None:
        """Find it."""
        self.weight, self.memory, self.csr = weight, delta.values.data_ptr(), None
        if delta.pending:
            return
        costs, csr = costs_of(weight.device), csr_of(delta)
        if csr is None or costs.few_tokens is None or weight.numel() < costs.large or csr.device != weight.device:
            return
        self.csr, self.dtype, self.tokens = csr, csr.dtype, costs.few_tokens


def product_of_few(layer: Any, args: Any, kwargs: Any) -> Tensor | None:
    """x (W + Δ)ᵀ + b of a `SamLinear`, added entry by entry, with its low-rank pair; nothing in it asks for a gradient.

    None where this is not the way for the layer, its adapters or their input: there `SamLayer.forward` knows how.
    """
    mine, active = layer.__dict__, layer._active_adapter
    if (
        len(args) != 1
        or kwargs
        or len(active) != 1
        or mine["transposed"]
        or mine["merged_adapters"]
        or mine["_tied"]
        or mine["scaling"]
        or mine["sample_adapters"]
        or layer._disable_adapters
    ):
        return None
    x, modules = args[0], mine["_modules"]
    base, held = modules["base_layer"], modules["sam_sparse_delta"]._modules.get(active[0])
    delta = None if held is None or len(held._modules) != 1 else held._modules.get("weight")
    weight = base._parameters.get("weight")
    if delta is None or type(weight) is not nn.Parameter or is_changed(base):  # a shard has no memory of its own
        return None
    found = delta.derive("few tokens", _Found)
    if found.weight is not weight or found.memory != delta._parameters["values"].data_ptr():
        found.look(delta, weight)
    if (
        found.csr is None
        or not x.dtype is weight.dtype is found.dtype
        or x.numel() > found.tokens * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    y = F.linear(x, weight, base._parameters["bias"])
    add_csr(y, x, found.csr)
    pair = modules["sam_sparse_low_rank"]._modules.get(active[0])
    return y if pair is None else pair(y, x)
