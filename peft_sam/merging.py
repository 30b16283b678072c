"""Writing deltas into the base parameters, and putting the original bits back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_sam.delta import PendingAdapterError, SparseDelta, changed
from peft_sam.owned import is_plain, stored_parameter


class Change(NamedTuple):
    """What merging did to one parameter: its entries at `indices` were `original`."""

    name: str
    indices: Tensor
    original: Tensor


@torch.no_grad()
def check_merge(base: nn.Module, adapter_name: str, deltas: Mapping[str, SparseDelta], safe_merge: bool) -> None:
    """Whether `deltas` can be merged into the parameters of `base`; nothing is written.

    Raises:
        PendingAdapterError: if the adapter has no support yet.
        ValueError: if a parameter is quantised or offloaded, or, with `safe_merge`, if an entry would not be finite.
    """
    for name, delta in deltas.items():
        if delta.pending:
            raise PendingAdapterError(adapter_name, "merged")
        parameter = stored_parameter(base, name)
        if not is_plain(parameter):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be merged: its parameter {name!r} of shape {tuple(delta.shape)} is "
                "quantised or offloaded. Merge into the full-precision model."
            )
        if safe_merge and not changed(parameter.take(delta.checked_indices()), delta.values).isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


@torch.no_grad()
def merge(base: nn.Module, deltas: Mapping[str, SparseDelta]) -> list[Change]:
    """Write θ + Δ."""
    changes = []
    for name, delta in deltas.items():
        parameter, indices = stored_parameter(base, name), delta.checked_indices()
        original = parameter.take(indices)
        parameter.put_(indices, changed(original, delta.values))
        changes.append(Change(name, indices, original))
    return changes


@torch.no_grad()
def restore(base: nn.Module, changes: list[Change]) -> None:
    """Write the original bits; the parameters may have moved since."""
    for name, indices, original in changes:
        parameter = stored_parameter(base, name)
        parameter.put_(indices.to(parameter.device), original.to(parameter.device, parameter.dtype))
