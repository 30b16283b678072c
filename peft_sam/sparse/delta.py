"""The sparse change of one parameter: its support and its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from peft_sam.sparse.coding import code_length, decode, encode
from peft_sam.sparse.support import check_support


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the values for a base parameter of `dtype`: float32 where the base has less (as PEFT does)."""
    return dtype if torch.finfo(dtype).bits >= 32 else torch.float32


def changed(entries: Tensor, values: Tensor) -> Tensor:
    """θ[support] + values in θ's dtype, for `entries` = θ.flatten()[indices]; the sum is in the values' dtype."""
    return (entries.to(values.dtype) + values).to(entries.dtype)


def _has_no_support(delta: SparseDelta) -> bool:
    indices = delta.indices
    return len(indices) == 0 or indices.is_meta or int(indices[0]) < 0


class PendingAdapterError(RuntimeError):
    """An adapter is trained, saved or merged before its parameters are selected."""

    def __init__(self, adapter_name: str, action: str) -> None:
        argument = "" if adapter_name == "default" else f', adapter_name="{adapter_name}"'
        super().__init__(
            f"The SAM adapter {adapter_name!r} cannot be {action}: no parameters are selected yet. Add one line after "
            "the trainer is made and before trainer.train():\n\n"
            f"    peft_sam.select_parameters(trainer{argument})\n\n"
            f"or, without a Trainer, peft_sam.select_parameters(model, dataloader{argument})."
        )


class SparseDelta(nn.Module):
    """Δ of one parameter θ of shape `shape`: Δ.flatten()[indices] = values, and 0 elsewhere.

    Attributes:
        indices: int64, 1-D, strictly increasing flat row-major positions in θ.
        values: as many trainable numbers.
        shape: the shape of θ.

    Before the support is chosen or loaded a delta is *pending*: it has no entries, or `indices` filled with -1 to
    hold the place of those that a file will bring.
    """

    # the buffer that holds the support
    form: ClassVar[str] = "indices"
    indices: Tensor

    def __init__(self, shape: torch.Size, support: Tensor, values: Tensor) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.values = nn.Parameter(values)
        self.register_buffer(self.form, support)
        self._derived: dict[Any, tuple[Tensor, int, Any]] = {}
        self._remembered: nn.Parameter | None = None

    @classmethod
    def place_holder(cls, parameter: Tensor, entries: int = 0) -> SparseDelta:
        """A pending delta for `parameter`, with room for `entries` entries."""
        indices = torch.full((entries,), -1, dtype=torch.int64, device=parameter.device)
        values = torch.zeros(entries, dtype=delta_dtype(parameter.dtype), device=parameter.device)
        return cls(parameter.shape, indices, values)

    @property
    def pending(self) -> bool:
        """Whether there is no support yet, or none in memory."""
        return bool(self.derive("pending", _has_no_support))

    def expect_dispatch(self) -> None:
        """Remember the values: PEFT is about to have Accelerate place the model's layers, on disk perhaps."""
        self._remembered = self.values

    def stay_at_hand(self) -> None:
        """Bring the values back if they were offloaded with their layer.

        They are few, and nobody calls a delta, so that Accelerate's hook would never bring them.
        """
        remembered, self._remembered = self._remembered, None
        hook: Any = getattr(self, "_hf_hook", None)
        if remembered is not None and hook is not None:
            self.values = remembered
            remove_hook_from_module(self)
            self.to(hook.execution_device)

    def derive(self, key: Any, make: Callable[[Any], Any]) -> Any:
        """`make(self)`, kept until the support changes: loading, moving and re-choosing all change it."""
        # every forward pass comes by here: nn.Module's own attribute look-up would take most of the time
        stored: Any = self._buffers[self.form]
        kept = self._derived.get(key)
        if kept is None or (
            not torch.compiler.is_compiling() and (kept[0] is not stored or kept[1] != stored._version)
        ):
            kept = self._derived[key] = (stored, stored._version, make(self))
        return kept[2]

    def can_hold(self, indices: Tensor) -> bool:
        """Whether this support can take the old one's place in the tensors that are there."""
        return len(self.values) == len(indices) and not self.values.is_meta

    def hold(self, indices: Tensor) -> None:
        """Put another support of the same size in the old one's place."""
        self.indices.copy_(indices)

    def checked_indices(self) -> Tensor:
        """The support, checked once against the parameter: values may come from a file through any door.

        Raises:
            ValueError: if it is no support of a parameter of this shape.
        """
        found: Tensor = self.derive("checked", _checked)
        return found

    # Accelerate shards a model (FSDP2) by moving it to the meta device and loading the parameters of the first process.
    # Every process knows the support, and keeps it.

    def _apply(self, fn: Any, recurse: bool = True) -> SparseDelta:
        support = getattr(self, self.form)
        super()._apply(fn, recurse)
        if getattr(self, self.form).is_meta:
            setattr(self, self.form, support)
        return self

    @property
    def _awaits_values(self) -> bool:
        return self.values.is_meta and not getattr(self, self.form).is_meta

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._awaits_values:
            del destination[f"{prefix}{self.form}"]

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        awaited = self._awaits_values
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *others)
        if awaited and f"{prefix}{self.form}" in missing:
            missing.remove(f"{prefix}{self.form}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"{len(self.values)} of {self.shape.numel()} entries, shape={tuple(self.shape)}"


def _checked(delta: SparseDelta) -> Tensor:
    check_support(delta.indices, delta.shape.numel(), "parameter")
    if len(delta.indices) != len(delta.values):
        raise ValueError(f"a sparse delta has {len(delta.indices)} indices but {len(delta.values)} values.")
    return delta.indices


class CodedDelta(SparseDelta):
    """A delta that holds its support as a file does: for loaders that fill a model's tensors from a file by name.

    Attributes:
        support: the code of the indices (`coding`), all zeros while it is awaited.
    """

    form: ClassVar[str] = "support"
    support: Tensor

    @classmethod
    def place_holder(cls, parameter: Tensor, entries: int = 0) -> SparseDelta:
        """A pending delta for `parameter`, with room for the code and the values of `entries` entries."""
        support = torch.zeros(code_length(entries, parameter.numel()), dtype=torch.uint8, device=parameter.device)
        values = torch.zeros(entries, dtype=delta_dtype(parameter.dtype), device=parameter.device)
        return cls(parameter.shape, support, values)

    @property
    def indices(self) -> Tensor:  # type: ignore[override]
        """The support, decoded."""
        found: Tensor = self.derive("indices", _decoded)
        return found

    def hold(self, indices: Tensor) -> None:
        """Put another support of the same size, and so with a code of the same length, in the old one's place."""
        self.support.copy_(encode(indices, self.shape.numel()))


def _decoded(delta: CodedDelta) -> Tensor:
    if delta.support.is_meta or not delta.support.any():
        return torch.full((len(delta.values),), -1, device=delta.support.device)
    return decode(delta.support, len(delta.values), delta.shape.numel(), "parameter")
