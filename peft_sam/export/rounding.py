"""What is left of Δ where θ⁰ + Δ is rounded to the dtype, or the codes, in which the weights are stored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_sam.export.parts import Adapter, Part
from peft_sam.layers.merging import merge, restore
from peft_sam.layers.quantised import dequantised
from peft_sam.sparse.delta import SparseDelta, changed
from peft_sam.tuner.merged import merged


@dataclass
class RoundingReport:
    """What rounding takes from an adapter. Prints as text.

    Attributes:
        stored: the dtype or the quantiser of the weights.
        entries: those with Δ ≠ 0.
        unmoved: share of them whose stored number is nearer to θ⁰ than to θ⁰ + Δ: in a dtype, those where |Δ| is below
            half a step and the number is that of θ⁰ (|θ⁰| / 512 to |θ⁰| / 256 in bfloat16).
        error: ‖Δ - what is left of it‖ / ‖Δ‖, over all entries of the weights.
        logits: ‖logits with what is left - logits with Δ‖ / ‖logits with Δ - logits without‖ on a batch, or None.
    """

    stored: str
    entries: int
    unmoved: float
    error: float
    logits: float | None = None

    def __str__(self) -> str:
        seen = "" if self.logits is None else f", and {self.logits:.2%} of what Δ does to the logits"
        moves = f"{self.unmoved:.2%} of {self.entries:,} entries do not move"
        return f"stored as {self.stored}, {moves}, and {self.error:.2%} of Δ is lost{seen}"


class _Sums(NamedTuple):
    """Of one weight: entries with Δ ≠ 0, those that do not move, ‖Δ - what is left‖², ‖Δ‖²."""

    entries: int
    unmoved: int
    missing: float
    whole: float


def rounding_report(
    model: nn.Module,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    batch: Mapping[str, Tensor] | None = None,
) -> RoundingReport:
    """What an adapter loses when it is merged, or exported as new weights. The model is as before.

    In half precision Δ is rounded with θ⁰; in 4 or 8 bits θ⁰ + Δ is rounded to the quantiser's codes, which
    often are those of θ⁰. An unmerged adapter on quantised weights loses nothing: Δ is multiplied on its own.

    Args:
        model: a PEFT model with a SAM adapter that has its support and is not merged.
        adapter_name: which adapter.
        dtype: in which the weights are to be stored, as an engine's; by default as they are.
        batch: what the model takes, for the error of the logits. It takes a copy of the model in float32, or, on
            quantised weights, three passes of the model as it is.

    Raises:
        TypeError, PendingAdapterError: as `export_adapter`.
        ValueError: if there is no such adapter, it has low-rank pairs, adapters are merged, or a weight cannot be read
            or written back.
    """
    adapter = Adapter(model, adapter_name)
    adapter.refuse_pairs("a rounding report")
    quantised = [part for part in adapter.parts if not part.readable]
    if quantised and dtype is not None:
        raise ValueError(f"dtype is for plain weights, and {quantised[0].name!r} is not plain in memory.")
    for part in quantised:
        part.layer.check_merge([adapter_name], safe_merge=False)
    sums = [_of_codes(part) if part in quantised else _of_dtype(part, dtype) for part in adapter.parts]
    entries, unmoved, missing, whole = (sum(column) for column in zip(*sums, strict=True))
    logits = None
    if batch is not None:
        logits = _of_logits(_quantised_passes(adapter, batch) if quantised else _plain_passes(adapter, dtype, batch))
    return RoundingReport(
        _name(quantised[0] if quantised else adapter.parts[0], dtype),
        int(entries),
        unmoved / max(entries, 1),
        sqrt(missing / whole) if whole else 0.0,
        logits,
    )


def _name(part: Part, dtype: torch.dtype | None) -> str:
    backend = part.layer.quantization_backend
    if part.readable or backend is None:
        return str(dtype or part.base.dtype).removeprefix("torch.")
    return str(backend.backend_name)


@torch.no_grad()
def _of_dtype(part: Part, dtype: torch.dtype | None) -> _Sums:
    before, after, values = _stored(part, dtype)
    left, delta = after.double() - before.double(), values.double()
    missing = float((left - delta).square().sum())
    return _Sums(int((delta != 0).sum()), _unmoved(left, delta), missing, float(delta.square().sum()))


def _unmoved(left: Tensor, delta: Tensor) -> int:
    return int(((delta - left).abs() > left.abs()).sum())


def _stored(part: Part, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """At the support: θ⁰ and θ⁰ + Δ as they are stored, and Δ."""
    values = part.delta.values.detach()
    entries = part.base.detach().take(part.delta.checked_indices())
    dtype = dtype or entries.dtype
    return entries.to(dtype), changed(entries, values).to(dtype), values


@torch.no_grad()
def _of_codes(part: Part) -> _Sums:
    base, backend = part.layer.get_base_layer(), part.layer.quantization_backend
    assert backend is not None
    before = dequantised(base, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it rounds, which is what is measured
        changes = merge(base, {part.parameter: part.delta}, None, backend)
    try:
        after = dequantised(base, backend)
    finally:
        restore(base, changes)
    indices, delta = part.delta.checked_indices(), part.delta.values.detach().double()
    left = (after - before).flatten().double()
    missing = float(left.index_add(0, indices, -delta).square().sum())
    return _Sums(int((delta != 0).sum()), _unmoved(left[indices], delta), missing, float(delta.square().sum()))


# Logits: without Δ, with Δ, and with what is left of it


def _of_logits(passes: Iterator[Tensor]) -> float:
    without, whole, left = passes
    return float((left - whole).norm() / (whole - without).norm())


@torch.no_grad()
def _plain_passes(adapter: Adapter, dtype: torch.dtype | None, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """In float32 throughout, so that nothing but the rounding of Δ differs."""
    bare: Any = adapter.bare_base()
    names = {id(parameter): name for name, parameter in bare.named_parameters()}
    single = copy.deepcopy(bare).eval()
    if dtype is not None:
        single.to(dtype)
    single = single.float()
    own = dict(single.named_parameters())
    yield single(**batch).logits.double()
    for kept in (False, True):
        for part in adapter.parts:
            before, after, values = _stored(part, dtype)
            new = after.float() if kept else before.float() + values
            own[names[id(part.base)]].put_(part.delta.checked_indices(), new)
        yield single(**batch).logits.double()


@torch.no_grad()
def _quantised_passes(adapter: Adapter, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
    model, modes = adapter.model, {module: module.training for module in adapter.model.modules()}
    deltas: list[SparseDelta] = [part.delta for part in adapter.parts]
    kept = [delta.values.detach().clone() for delta in deltas]
    active = list(model.active_adapters)
    try:
        model.eval()
        model.base_model.set_adapter([adapter.name])
        for delta in deltas:
            delta.values.zero_()
        yield model(**batch).logits.double()
        for delta, values in zip(deltas, kept, strict=True):
            delta.values.copy_(values)
        yield model(**batch).logits.double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with merged(model, [adapter.name]):
                yield model(**batch).logits.double()
    finally:
        for delta, values in zip(deltas, kept, strict=True):
            delta.values.copy_(values)
        model.base_model.set_adapter(active)
        for module, mode in modes.items():
            module.training = mode
