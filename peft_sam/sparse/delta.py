"""The sparse change of one parameter: its support and its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_sam.sparse.at_hand import AtHand
from peft_sam.sparse.coding import code_length, decode, encode
from peft_sam.sparse.support import check_support


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the values for a base parameter of `dtype`: float32 where the base has less (as PEFT does)."""
    return dtype if torch.finfo(dtype).bits >= 32 else torch.float32


def changed(entries: Tensor, values: Tensor) -> Tensor:
    """θ[support] + values in θ's dtype, for `entries` = θ.flatten()[indices]; the sum is in the values' dtype."""
    return (entries.to(values.dtype) + values).to(entries.dtype)


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


class SparseDelta(AtHand):
    """Δ of one parameter θ of shape `shape`: Δ.flatten()[indices] = values, and 0 elsewhere.

    Its state, in memory as in files, is the code of the support and the values.

    Attributes:
        support: the code of the indices (`coding`), uint8 and 1-D.
        values: trainable numbers, one per entry.
        shape: the shape of θ.

    Before the support is chosen or loaded a delta is *pending*: it has no entries.
    """

    support: Tensor

    def __init__(self, shape: torch.Size, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.values = nn.Parameter(values)
        self.register_buffer("support", _code(indices, self.shape.numel()))
        self._forget()
        self._sharded = False

    @classmethod
    def place_holder(cls, parameter: Tensor) -> SparseDelta:
        """A pending delta for `parameter`."""
        none = torch.empty(0, dtype=torch.int64, device=parameter.device)
        return cls(parameter.shape, none, torch.zeros(0, dtype=delta_dtype(parameter.dtype), device=parameter.device))

    @property
    def indices(self) -> Tensor:
        """The support: int64, 1-D, strictly increasing flat row-major positions in θ."""
        found: Tensor = self.derive("indices", _decoded)
        return found

    @property
    def pending(self) -> bool:
        """Whether there is no support yet, or none in memory."""
        return bool(self.derive("pending", _has_no_support))

    def derive(self, key: Any, make: Callable[[Any], Any]) -> Any:
        """`make(self)`, kept until the support changes: loading, moving and re-choosing all change it."""
        # every forward pass comes by here: nn.Module's own attribute look-up would take most of the time
        stored: Any = self._buffers["support"]
        if not torch.compiler.is_compiling() and (self._seen is not stored or self._version != version_of(stored)):
            self._look_again(stored)
        if key not in self._derived:
            self._derived[key] = make(self)
        return self._derived[key]

    def _forget(self) -> None:
        self._derived: dict[Any, Any] = {}
        self._seen: Any = None
        self._seen_bytes: Tensor | None = None
        self._version = 0

    def _look_again(self, stored: Tensor) -> None:
        # DistributedDataParallel writes the buffers before each forward pass: the same bytes
        same = self._seen is stored and self._seen_bytes is not None and torch.equal(self._seen_bytes, stored)
        if not same:
            self._forget()
            self._seen, self._seen_bytes = stored, None if stored.is_meta else stored.clone()
        self._version = version_of(stored)

    def can_hold(self, indices: Tensor) -> bool:
        """Whether this support can take the old one's place in the tensors that are there."""
        return len(self.values) == len(indices) and not self.values.is_meta

    def hold(self, indices: Tensor) -> None:
        """Put another support of the same size, and so with a code of the same length, in the old one's place."""
        self.support.copy_(encode(indices, self.shape.numel()))
        self._forget()  # tensors made in inference mode do not tell that they were written to

    def checked_indices(self) -> Tensor:
        """The support, checked once against the parameter: values may come from a file through any door.

        Raises:
            ValueError: if it is no support of a parameter of this shape.
        """
        found: Tensor = self.derive("checked", _checked)
        return found

    def leave_values_out(self) -> None:
        """Put the values on the meta device: they will be loaded."""
        self.values = nn.Parameter(self.values.data.to("meta"), requires_grad=self.values.requires_grad)

    # Accelerate shards a model (FSDP2) by moving it to the meta device and loading the parameters of the first process.
    # Every process knows the support, and keeps it.

    def _apply(self, fn: Any, recurse: bool = True) -> SparseDelta:
        support = self.support
        super()._apply(fn, recurse)
        if self.support.is_meta and not support.is_meta:
            self.support, self._sharded = support, True
        return self

    @property
    def _awaits_values(self) -> bool:
        return self._sharded and self.values.is_meta and not self.support.is_meta

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._awaits_values:
            del destination[f"{prefix}support"]

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        awaited = self._awaits_values
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *others)
        if awaited and f"{prefix}support" in missing:
            missing.remove(f"{prefix}support")
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}, "_seen": None, "_seen_bytes": None}

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"{len(self.values)} of {self.shape.numel()} entries, shape={tuple(self.shape)}"


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; unknown of those made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _code(indices: Tensor, numel: int) -> Tensor:
    if len(indices):
        return encode(indices, numel).to(indices.device)
    return torch.zeros(code_length(0, numel), dtype=torch.uint8, device=indices.device)


def _has_no_support(delta: SparseDelta) -> bool:
    # each position sets a bit in its code
    return len(delta.values) == 0 or delta.support.is_meta or not bool(delta.support.any())


def _decoded(delta: SparseDelta) -> Tensor:
    if _has_no_support(delta):
        return torch.full((len(delta.values),), -1, device=delta.support.device)
    return decode(delta.support, len(delta.values), delta.shape.numel(), "parameter")


def _checked(delta: SparseDelta) -> Tensor:
    check_support(delta.indices, delta.shape.numel(), "parameter")
    if len(delta.indices) != len(delta.values):
        raise ValueError(f"a sparse delta has {len(delta.indices)} indices but {len(delta.values)} values.")
    return delta.indices
