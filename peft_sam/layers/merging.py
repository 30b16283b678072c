"""Writing deltas into the base parameters, and putting the original bits back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_sam._peft import QuantizationBackend
from peft_sam.layers.low_rank import Pair, composed_with
from peft_sam.layers.owned import is_plain, stored_parameter
from peft_sam.layers.quantised import Codes, dequantised, put_back, requantise
from peft_sam.sparse.delta import SparseDelta, changed, version_of


class Change(NamedTuple):
    """What merging did to one parameter: its entries at `indices` were `original`; None: all of it was.

    Attributes:
        by: what changed it, and how often that had been written to.
    """

    name: str
    indices: Tensor | None
    original: Tensor | Codes
    by: list[SparseDelta | Pair]
    versions: list[int]


@torch.no_grad()
def check_merge(
    base: nn.Module,
    adapter_name: str,
    deltas: Mapping[str, SparseDelta],
    pair: Pair | None,
    safe_merge: bool,
    backend: QuantizationBackend | None,
) -> None:
    """Whether `deltas`, and a low-rank pair of the weight, can be merged into `base`; nothing is written.

    Pending ones can: they are nothing to write.

    Raises:
        ValueError: if a parameter is offloaded, or quantised so that PEFT's `backend` (None: none) cannot write it, or,
            with `safe_merge`, if an entry would not be finite.
    """
    for name, of in _by_parameter(deltas, pair).items():
        writable = backend is not None and backend.supports_merge
        if not is_plain(stored_parameter(base, name)) and not writable:
            how = "quantised or offloaded" if backend is None else f"quantised ({backend.backend_name})"
            raise ValueError(
                f"adapter {adapter_name!r} cannot be merged: its parameter {name!r} of shape {tuple(of[0].shape)} is "
                f"{how} in a way that cannot be written back. Merge into the full-precision model."
            )
        if safe_merge and not _after(_weight(base, name, backend), of)[1].isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


@torch.no_grad()
def merge(
    base: nn.Module, deltas: Mapping[str, SparseDelta], pair: Pair | None, backend: QuantizationBackend | None
) -> list[Change]:
    """Write θ + Δ; into a quantised weight, what its codes can say of it. A pending Δ is nothing to write.

    Beside a low-rank pair all of the weight changes, and is kept.
    """
    changes = []
    for name, of in _by_parameter(deltas, pair).items():
        weight = _weight(base, name, backend)
        indices, entries = _after(weight, of)
        plain = weight is stored_parameter(base, name)
        original = (weight.clone() if indices is None else weight.take(indices)) if plain else None
        if indices is None:
            weight.copy_(entries)
        else:
            _put(weight, indices, entries)
        if original is None:
            assert backend is not None
            changes.append(Change(name, indices, requantise(base, backend, weight), of, _versions(of)))
        else:
            changes.append(Change(name, indices, original, of, _versions(of)))
    return changes


def _versions(changes: list[SparseDelta | Pair]) -> list[int]:
    of = [(*change.low_rank.parameters(),) if isinstance(change, Pair) else (change.values,) for change in changes]
    return [version_of(tensor) for tensors in of for tensor in tensors]


def _by_parameter(deltas: Mapping[str, SparseDelta], pair: Pair | None) -> dict[str, list[SparseDelta | Pair]]:
    """What is to be written, by parameter name."""
    found: dict[str, list[SparseDelta | Pair]] = {n: [delta] for n, delta in deltas.items() if not delta.pending}
    if pair is not None:
        found.setdefault("weight", []).append(pair)
    return found


def _after(weight: Tensor, changes: list[SparseDelta | Pair]) -> tuple[Tensor | None, Tensor]:
    """Which entries change, None for all, and what they become."""
    first = changes[0]
    if len(changes) == 1 and not isinstance(first, Pair):
        indices = first.checked_indices()
        return indices, changed(weight.take(indices), first.values)
    return None, composed_with(weight, changes)


def _weight(base: nn.Module, name: str, backend: QuantizationBackend | None) -> Tensor:
    parameter = stored_parameter(base, name)
    if is_plain(parameter):
        return parameter
    assert backend is not None
    return dequantised(base, backend)


@torch.no_grad()
def restore(base: nn.Module, changes: list[Change]) -> None:
    """Write the original bits; the parameters may have moved since.

    What another tuner has added to a parameter meanwhile, or taken from it, stays, to rounding.
    """
    for change in changes:
        if isinstance(change.original, Codes):
            put_back(base, change.original)
            continue
        parameter = stored_parameter(base, change.name)
        original = change.original.to(parameter.device, parameter.dtype)
        indices = None if change.indices is None else change.indices.to(parameter.device)
        now, written = parameter if indices is None else parameter.take(indices), _written(change, original)
        if written is not None:
            original = _with_what_others_did(original, written, now, rounded=indices is None)
        if indices is None:
            parameter.copy_(original)
        else:
            _put(parameter, indices, original)


def _with_what_others_did(original: Tensor, written: Tensor, now: Tensor, rounded: bool) -> Tensor:
    """The original entries, and where others have changed what was written, their change on top; waits for no device.

    Args:
        rounded: a product of two factors was written, which another device or number of threads rounds otherwise.
    """
    dtype = torch.promote_types(now.dtype, torch.float32)
    change = now.to(dtype) - written.to(dtype)
    kept = (now == written) | (now.isnan() & written.isnan())
    if rounded:
        kept |= change.abs() <= 2 * torch.finfo(now.dtype).eps * written.to(dtype).abs()
    return torch.where(kept, original, (original.to(dtype) + change).to(original.dtype))


def _written(change: Change, original: Tensor) -> Tensor | None:
    """What merging wrote; None if the deltas are others by now."""
    if _versions(change.by) != change.versions:
        return None
    if change.indices is None:
        return composed_with(original, change.by)
    values = change.by[0].values.to(original.device)  # type: ignore[union-attr]
    return changed(original, values) if len(values) == len(original) else None


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
            indices = change.indices
            tensor = original if indices is None else tensor.clone().put_(indices.to(tensor.device), original)
    return tensor
