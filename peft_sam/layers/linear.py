"""Linear layers, by products that neither keep a copy of the weight nor compute its dense gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import BaseTunerLayer
from peft_sam.layers.base import SamLayer
from peft_sam.layers.few_tokens import product_of_few
from peft_sam.layers.owned import is_bare, is_plain, packed_weight
from peft_sam.layers.substitute import is_written_down
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.ops import sparse_linear
from peft_sam.sparse.plan import plan_linear


class SamLinear(SamLayer):
    """`nn.Linear`, its quantised kin, or transformers' `Conv1D`.

    By `sparse_linear` where the weight can be read and nobody watches the module. Where it cannot be read (quantised,
    offloaded, sharded) the module runs as it is, and the products with the deltas are added to its output.
    """

    # whether the weight is stored as (inputs × outputs)
    transposed: bool
    # an attribute `weight` of such a layer is not its weight (transformers gives HQQ's an empty one)
    packed: bool

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self.packed = packed_weight(self.get_base_layer()) is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with θ + Σ Δ over the active adapters; without Δ if merged or disabled."""
        slow = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        y = None if slow else product_of_few(self, args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y

    def _forward_with(self, changes: Mapping[str, list[SparseDelta]], *args: Any, **kwargs: Any) -> Any:
        base: Any = self.base_layer
        if len(args) != 1 or kwargs:
            return super()._forward_with(changes, *args, **kwargs)
        weight = (self.get_base_layer() if isinstance(base, BaseTunerLayer) else base)._parameters.get("weight")
        if self.packed or not (weight is None or is_plain(weight)):
            return self._added_to_output(changes, args[0])
        if "weight" not in changes or args[0].ndim < 2 or not is_bare(base) or is_written_down():
            return super()._forward_with(changes, *args)
        return sparse_linear(args[0], weight, base.bias, changes["weight"], changes.get("bias", ()), self.transposed)

    def _added_to_output(self, changes: Mapping[str, list[SparseDelta]], x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if "weight" in changes:
            x = x.to(y.device, y.dtype)
            added = sparse_linear(x if x.ndim > 1 else x[None], None, None, changes["weight"], (), self.transposed)
            y = y + added.to(y.dtype).view(y.shape)
        for delta in changes.get("bias", ()):
            y = y.index_add(-1, delta.checked_indices(), delta.values.to(y.dtype).expand(*y.shape[:-1], -1))
        return y

    def _prepare(self, name: str, delta: SparseDelta) -> None:
        super()._prepare(name, delta)
        if name == "weight":
            plan_linear(delta, self.transposed)

    def extra_repr(self) -> str:
        """How the products of each adapter are computed, and PEFT's access to a quantised weight."""
        deltas = {name: self.deltas(name).get("weight") for name in self.sam_sparse_delta}
        plans = [
            f"{name}: {plan_linear(delta, self.transposed)}"
            for name, delta in deltas.items()
            if delta is not None and not delta.pending and not delta.indices.is_meta
        ]
        backend = self.quantization_backend
        return ", ".join(plans if backend is None else [*plans, f"quantization_backend={backend.backend_name!r}"])
