"""A delta times a number, in place of the delta."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_sam.sparse.delta import SparseDelta


class ScaledDelta:
    """s·Δ, with the support and all that is derived from it of Δ; read as a `SparseDelta` is, and not to be kept."""

    def __init__(self, delta: SparseDelta, scale: float) -> None:
        self._delta, self._scale = delta, scale

    @property
    def values(self) -> Tensor:
        """Those of Δ times s; gradients flow to Δ's."""
        return self._delta.values * self._scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self._delta, name)
