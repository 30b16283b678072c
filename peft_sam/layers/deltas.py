"""The deltas of one adapter in one layer, under names that state dicts can hold, and making a delta for a support."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_sam.layers.replicas import keep_equal
from peft_sam.sparse.delta import SparseDelta, delta_dtype

# Standard deviation of the deltas that init_weights=False starts from.
TEST_INIT_STD = 0.02


def key_of(name: str) -> str:
    """The name of a parameter as one part of a state dict's key, where dots part modules: "out_proj/weight"."""
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "/")


def name_of(key: str) -> str:
    """The parameter whose `key_of` that is."""
    return key.replace("/", ".").replace("%2F", "/").replace("%25", "%")


class Deltas(nn.Module):
    """Parameter name (relative to the layer's module) → `SparseDelta`.

    No nn.ModuleDict, which refuses names such as "keys".
    """

    def __init__(self, deltas: Mapping[str, SparseDelta] | None = None) -> None:
        super().__init__()
        for name, delta in (deltas or {}).items():
            self.put(name, delta)

    def put(self, name: str, delta: SparseDelta) -> None:
        """Take in the delta of one parameter, in the place of the one there was."""
        self._modules[key_of(name)] = delta

    def drop(self, name: str) -> None:
        """Remove the delta of one parameter."""
        del self._modules[key_of(name)]

    def by_name(self) -> dict[str, SparseDelta]:
        """All of them."""
        # every forward pass comes by here: nn.Module's own look-up would take most of the time
        found: dict[str, SparseDelta] = self._modules  # type: ignore[assignment]
        return {name_of(key): delta for key, delta in found.items()}


def delta_for(parameter: Tensor, indices: Tensor, old: SparseDelta | None, trainable: bool) -> SparseDelta:
    """A delta of zeros on a support in `parameter`: `old` with its tensors, where they have the size, or a new one.

    An optimizer that holds the old one's values goes on then, also if these were none: they grow.
    """
    if old is not None and old.can_hold(indices):
        old.hold(indices)
        with torch.no_grad():
            old.values.zero_()
        return old
    dtype = delta_dtype(parameter.dtype) if old is None else old.values.dtype
    device = indices.device if parameter.is_meta else parameter.device
    values = torch.zeros(len(indices), dtype=dtype, device=device)
    delta = SparseDelta(parameter.shape, indices.to(device, torch.int64, copy=True), values)
    delta.values.requires_grad_(trainable if old is None else old.values.requires_grad)
    if old is not None and can_grow(old.values):
        old.values.data = delta.values.data
        delta.values = old.values
    keep_equal(delta.values, parameter)
    return delta


def can_grow(values: nn.Parameter) -> bool:
    """Whether the values of a pending delta can become those of its support and stay the same `nn.Parameter`."""
    plain = type(values) is nn.Parameter and not values.is_meta and not values.is_inference()
    return plain and len(values) == 0


def is_held(values: nn.Parameter) -> bool:
    """Whether somebody waits for a gradient of no entries from a pending delta: DistributedDataParallel does."""
    if not values.requires_grad or not can_grow(values):
        return False
    none = values.data
    try:
        values.data = none.new_zeros(1)
        with torch.inference_mode(False), torch.enable_grad():
            torch.autograd.grad(values.sum(), values)
    except RuntimeError:
        return True
    finally:
        values.data = none
    return False


@torch.no_grad()
def set_to_random(delta: SparseDelta) -> None:
    """Small random values instead of zeros (`init_weights=False`)."""
    delta.values.copy_(torch.randn(len(delta.values)) * TEST_INIT_STD)
