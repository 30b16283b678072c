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
from peft_sam.layers.low_rank import Changes, LowRank, Pair
from peft_sam.layers.owned import is_bare, is_plain, packed_weight
from peft_sam.layers.replicas import keep_equal
from peft_sam.layers.substitute import is_written_down
from peft_sam.sparse.delta import SparseDelta, delta_dtype
from peft_sam.sparse.ops import sparse_linear
from peft_sam.sparse.plan import plan_linear


class SamLinear(SamLayer):
    """`nn.Linear`, its quantised kin, or transformers' `Conv1D`.

    By `sparse_linear` where the weight can be read and nobody watches the module. Where it cannot be read (quantised,
    offloaded, sharded) the module runs as it is, and the products with the deltas are added to its output, as those
    with low-rank pairs always are.

    Attributes:
        sam_sparse_low_rank: adapter name → its pair beside the delta of the weight, where it has one.
    """

    adapter_layer_names = ("sam_sparse_delta", "sam_sparse_low_rank")
    sam_sparse_low_rank: nn.ModuleDict
    # whether the weight is stored as (inputs × outputs)
    transposed: bool
    # an attribute `weight` of such a layer is not its weight (transformers gives HQQ's an empty one)
    packed: bool

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self.packed = packed_weight(self.get_base_layer()) is not None
        self.sam_sparse_low_rank = nn.ModuleDict()

    def pair(self, adapter_name: str) -> LowRank | None:
        """The low-rank pair beside an adapter's delta of the weight, if there is one."""
        found: LowRank | None = self.sam_sparse_low_rank._modules.get(adapter_name)  # type: ignore[assignment]
        return found

    def add_pair(self, adapter_name: str, r: int, alpha: float, dropout: float, *, empty: bool, **how: Any) -> None:
        """Give an adapter a pair, which starts as `LowRank.reset` says, or, if `empty`, waits on the meta device."""
        weight = self.parameters_below()["weight"]
        how |= {"dtype": delta_dtype(weight.dtype), "device": torch.device("meta") if empty else weight.device}
        pair = LowRank(weight.shape, self.transposed, r, alpha, dropout, **how)
        pair.train(self.get_base_layer().training)
        for factor in pair.parameters():
            keep_equal(factor, weight)
        self.sam_sparse_low_rank[adapter_name] = pair
        pair.requires_grad_(adapter_name in self.active_adapters and not self._disable_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with θ + Σ Δ over the active adapters; without Δ if merged or disabled."""
        slow = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        y = None if slow else product_of_few(self, args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y

    def reset_pair(self, adapter_name: str) -> None:
        """Have the pair of an adapter, if it has one, start; from the meta device it comes to where the deltas are."""
        if (pair := self.pair(adapter_name)) is not None:
            devices = [delta.values.device for delta in self.deltas(adapter_name).values()]
            self._bring(pair, next(iter(devices), torch.device("cpu")))
            pair.reset()

    def _bring(self, pair: LowRank, else_to: torch.device) -> None:
        """Give a pair on the meta device memory where the weight is, or, if that is there too, elsewhere."""
        weight = self.parameters_below()["weight"]
        if pair.lora_A.is_meta:
            pair.to_empty(device=else_to if weight.is_meta else weight.device)
            for factor in pair.parameters():
                keep_equal(factor, weight)

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state, prefix, *others)
        for adapter_name, pair in self.sam_sparse_low_rank.items():
            given = state.get(f"{prefix}sam_sparse_low_rank.{adapter_name}.lora_A")
            if given is not None and not self.parameters_below()["weight"].is_meta:
                self._bring(pair, given.device)  # type: ignore[arg-type]

    def drop_pair(self, adapter_name: str) -> None:
        """Take it away."""
        del self.sam_sparse_low_rank[adapter_name]

    @torch.no_grad()
    def set_pair(self, adapter_name: str, factors: Mapping[str, Tensor] | None) -> None:
        """Give an adapter's pair its numbers, `lora_A` and `lora_B`, or none: then it changes nothing.

        From the meta device it comes to the weight's, or, where that is offloaded, to theirs.
        """
        pair, weight = self.pair(adapter_name), self.parameters_below()["weight"]
        assert pair is not None
        if factors is None:
            factors = {"lora_A": pair.lora_A, "lora_B": torch.zeros_like(pair.lora_B)}
        for name, own in pair.named_parameters():
            if own.is_meta:
                device = factors[name].device if weight.is_meta else weight.device
                new = factors[name].to(device, own.dtype, copy=True)
                setattr(pair, name, nn.Parameter(new, requires_grad=own.requires_grad))
                keep_equal(getattr(pair, name), weight)
            else:
                own.copy_(factors[name])

    def _forward_with(self, changes: Changes, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return super()._forward_with(changes, *args, **kwargs)
        pairs = [change for change in changes.get("weight", ()) if isinstance(change, Pair)]
        if not pairs:
            return self._with_deltas(changes, args[0])
        sparse = {n: [one for one in of if not isinstance(one, Pair)] for n, of in changes.items()}
        y: Tensor = self._with_deltas({name: of for name, of in sparse.items() if of}, args[0])
        for pair in pairs:
            y = pair.added_to_output(y, args[0])
        return y

    def _with_deltas(self, changes: Any, x: Tensor) -> Any:
        base: Any = self.base_layer
        if not changes:
            return base(x)
        within = isinstance(base, BaseTunerLayer)
        weight = (self.get_base_layer() if within else base)._parameters.get("weight")
        if self.packed or not (weight is None or is_plain(weight)):
            return self._added_to_output(changes, x)
        if "weight" not in changes or x.ndim < 2 or within or not is_bare(base) or is_written_down():
            return super()._forward_with(changes, x)
        return sparse_linear(x, weight, base.bias, changes["weight"], changes.get("bias", ()), self.transposed)

    def _added_to_output(self, changes: Any, x: Tensor) -> Tensor:
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
