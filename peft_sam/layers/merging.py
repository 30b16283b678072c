"""Writing deltas into the base parameters, and putting the original bits back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_sam._peft import QuantizationBackend
from peft_sam.layers.low_rank import Pair, composed_with
from peft_sam.layers.owned import is_plain, stored_parameter
from peft_sam.layers.quantised import Codes, dequantised, put_back, requantise
from peft_sam.sparse.delta import SparseDelta, changed

# of an adapter in a module: its deltas by parameter, and a low-rank pair of the weight
Own = tuple[Mapping[str, SparseDelta], Pair | None]


class Change(NamedTuple):
    """What merging did to one parameter: its entries at `indices` were `original`; None: all of it was.

    Attributes:
        written: what the entries became; where all did, copies of what was added to them, in order.
    """

    name: str
    indices: Tensor | None
    original: Tensor | Codes
    written: Tensor | list[Added | Pair]


class Added(NamedTuple):
    """Numbers added at some places; read as a `SparseDelta` is, which may get others."""

    places: Tensor
    values: Tensor

    def checked_indices(self) -> Tensor:
        """The places."""
        return self.places


@torch.no_grad()
def check_merge(
    base: nn.Module, adapters: Mapping[str, Own], safe_merge: bool, backend: QuantizationBackend | None
) -> None:
    """Whether adapters can be merged into `base`, one after the other; nothing is written.

    Pending ones can: they are nothing to write.

    Raises:
        ValueError: if a parameter is offloaded, or quantised so that PEFT's `backend` (None: none) cannot write it, or,
            with `safe_merge`, if an entry would not be finite.
    """
    after: dict[str, Tensor] = {}
    for adapter_name, (deltas, pair) in adapters.items():
        for name, of in _by_parameter(deltas, pair).items():
            writable = backend is not None and backend.supports_merge
            if not is_plain(stored_parameter(base, name)) and not writable:
                how = "quantised or offloaded" if backend is None else f"quantised ({backend.backend_name})"
                raise ValueError(
                    f"adapter {adapter_name!r} cannot be merged: its parameter {name!r} of shape "
                    f"{tuple(of[0].shape)} is {how} in a way that cannot be written back. Merge into the "
                    "full-precision model."
                )
            if safe_merge:
                weight = after[name] if name in after else _weight(base, name, backend)
                if not _after(weight, of)[1].isfinite().all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    )
                if len(adapters) > 1:  # the next adds to it
                    after[name] = composed_with(weight, of)


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
            changes.append(Change(name, indices, requantise(base, backend, weight), []))
        else:
            changes.append(Change(name, indices, original, _as_they_are(of) if indices is None else entries))
    return changes


def _as_they_are(changes: list[SparseDelta | Pair]) -> list[Added | Pair]:
    """Copies, which no training reaches."""
    return [
        Pair(copy.deepcopy(change.low_rank), change.scale)
        if isinstance(change, Pair)
        else Added(change.checked_indices(), change.values.clone())
        for change in changes
    ]


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
        parameter, written = stored_parameter(base, change.name), change.written
        indices = None if change.indices is None else change.indices.to(parameter.device)
        now = parameter if indices is None else parameter.take(indices)
        if not isinstance(written, Tensor):
            written = composed_with(change.original, written)  # type: ignore[arg-type]
        original = _with_what_others_did(change.original, written, now, rounded=indices is None)
        if indices is None:
            parameter.copy_(original)
        else:
            _put(parameter, indices, original)


def _with_what_others_did(original: Tensor, written: Tensor, now: Tensor, rounded: bool) -> Tensor:
    """The original entries, and where others have changed what was written, their change on top; waits for no device.

    Args:
        rounded: a product of two factors was written, which another number of threads rounds otherwise.
    """
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (original, now))
    original, written = original.to(now.device, now.dtype), written.to(now.device, now.dtype)
    dtype = torch.promote_types(now.dtype, torch.float32)
    change = now.to(dtype) - written.to(dtype)
    kept = (now == written) | (now.isnan() & written.isnan())
    if rounded:
        kept |= change.abs() <= 2 * eps * written.to(dtype).abs()
    return torch.where(kept, original, (original.to(dtype) + change).to(original.dtype))


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
