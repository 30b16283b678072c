"""Linear layers, by products that neither keep a copy of the weight nor compute its dense gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import BaseTunerLayer
from peft_sam.layers.base import SamLayer
from peft_sam.layers.owned import is_bare, is_changed, is_plain, packed_weight
from peft_sam.layers.substitute import is_written_down
from peft_sam.sparse.costs import costs_of
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.ops import sparse_linear
from peft_sam.sparse.plan import plan_linear
from peft_sam.sparse.products import add_csr, csr_of


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
        y = None if slow else self._by_entries(args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y

    def _by_entries(self, args: Any, kwargs: Any) -> Tensor | None:
        """The output for a few tokens by the shortest way to it, since calls are most of what they cost.

        None where it is not for this layer, its adapters or their input: there `SamLayer.forward` knows how. Everything
        is looked up in the modules' own dicts, which takes a tenth of the time of their attributes.
        """
        mine, active = self.__dict__, self._active_adapter
        if (
            len(args) != 1
            or kwargs
            or len(active) != 1
            or self.transposed
            or mine["merged_adapters"]
            or mine["_tied"]
            or mine["scaling"]
            or mine["sample_adapters"]
            or self._disable_adapters
        ):
            return None
        x, modules = args[0], mine["_modules"]
        base, held = modules["base_layer"], modules["sam_sparse_delta"]._modules.get(active[0])
        weight, costs = base._parameters.get("weight"), costs_of(x.device)
        if (
            held is None
            or costs.few_tokens is None
            or x.numel() > costs.few_tokens * x.shape[-1]
            or type(weight) is not nn.Parameter
            or weight.device != x.device
            or weight.numel() < costs.large
            or weight.requires_grad
            or is_changed(base)
        ):
            return None
        delta = held._modules.get("weight")
        csr = None if delta is None or len(held._modules) != 1 or delta.pending else csr_of(delta)
        if csr is None or not weight.dtype is x.dtype is csr.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        y = F.linear(x, weight, base._parameters["bias"])
        add_csr(y, x, csr)
        return y

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
