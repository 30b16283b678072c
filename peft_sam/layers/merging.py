"""Writing deltas into the base parameters, and putting the original bits back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_sam._peft import QuantizationBackend
from peft_sam.layers.owned import is_plain, stored_parameter
from peft_sam.layers.quantised import Codes, dequantised, put_back, requantise
from peft_sam.sparse.delta import SparseDelta, changed


class Change(NamedTuple):
    """What merging did to one parameter: its entries at `indices` were `original`, or all of it was those codes."""

    name: str
    indices: Tensor
    original: Tensor | Codes


@torch.no_grad()
def check_merge(
    base: nn.Module,
    adapter_name: str,
    deltas: Mapping[str, SparseDelta],
    safe_merge: bool,
    backend: QuantizationBackend | None,
) -> None:
    """Whether `deltas` can be merged into the parameters of `base`; nothing is written.

    Pending ones can: they are nothing to write.

    Raises:
        ValueError: if a parameter is offloaded, or quantised so that PEFT's `backend` (None: none) cannot write it, or,
            with `safe_merge`, if an entry would not be finite.
    """
    for name, delta in deltas.items():
        if delta.pending:
            continue
        writable = backend is not None and backend.supports_merge
        if not is_plain(stored_parameter(base, name)) and not writable:
            how = "quantised or offloaded" if backend is None else f"quantised ({backend.backend_name})"
            raise ValueError(
                f"adapter {adapter_name!r} cannot be merged: its parameter {name!r} of shape {tuple(delta.shape)} is "
                f"{how} in a way that cannot be written back. Merge into the full-precision model."
            )
        if safe_merge:
            entries = _weight(base, name, backend).take(delta.checked_indices())
            if not changed(entries, delta.values).isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


@torch.no_grad()
def merge(base: nn.Module, deltas: Mapping[str, SparseDelta], backend: QuantizationBackend | None) -> list[Change]:
    """Write θ + Δ; into a quantised weight, what its codes can say of it. A pending Δ is nothing to write."""
    changes = []
    for name, delta in deltas.items():
        if delta.pending:
            continue
        weight, indices = _weight(base, name, backend), delta.checked_indices()
        entries = weight.take(indices)
        _put(weight, indices, changed(entries, delta.values))
        if weight is stored_parameter(base, name):
            changes.append(Change(name, indices, entries))
        else:
            assert backend is not None
            changes.append(Change(name, indices, requantise(base, backend, weight)))
    return changes


def _weight(base: nn.Module, name: str, backend: QuantizationBackend | None) -> Tensor:
    parameter = stored_parameter(base, name)
    if is_plain(parameter):
        return parameter
    assert backend is not None
    return dequantised(base, backend)


@torch.no_grad()
def restore(base: nn.Module, changes: list[Change]) -> None:
    """Write the original bits; the parameters may have moved since."""
    for name, indices, original in changes:
        if isinstance(original, Codes):
            put_back(base, original)
        else:
            parameter = stored_parameter(base, name)
            _put(parameter, indices.to(parameter.device), original.to(parameter.device, parameter.dtype))


def _put(parameter: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Write entries at flat positions; Tensor.put_ refuses to under `torch.use_deterministic_algorithms(True)`."""
    if parameter.is_contiguous():
        parameter.view(-1).index_copy_(0, indices, entries)
    else:
        parameter[torch.unravel_index(indices, parameter.shape)] = entries


@torch.no_grad()
def without(changes: list[Change], name: str, tensor: Tensor) -> Tensor:
    """A merged parameter with the bits that it had before those `changes`; quantised ones as they are."""
    for change in changes:
        if change.name == name and not isinstance(change.original, Codes):
            original = change.original.to(tensor.device, tensor.dtype)
            tensor = tensor.clone().put_(change.indices.to(tensor.device), original)
    return tensor
