"""What a layer holds: the deltas of its adapters, and those of parameters that it shares with other layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_sam._peft import BaseTunerLayer, QuantizationBackend
from peft_sam.layers.deltas import Deltas, delta_for, set_to_random
from peft_sam.layers.facade import Facade
from peft_sam.layers.low_rank import LowRank
from peft_sam.layers.owned import features, own_parameters
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.scaled import ScaledDelta
from peft_sam.sparse.support import check_support


def _prepare_after_loading(layer: Holder, _: Any) -> None:
    layer._prepare_all()


class Holder(Facade, BaseTunerLayer):
    """A facade of a module with deltas of its parameters, for any number of adapters.

    Attributes:
        quantization_backend: PEFT's access to the weight of a quantised linear layer, else None.
        base_layer: the module; its parameters are never written, except by `merge`.
        sam_sparse_delta: adapter name → parameter name (relative to the module) → `SparseDelta`.
        in_features, out_features: of the module, or None if it has no such numbers.
        scaling: adapter name → what its deltas are multiplied with, where that is not 1 (`set_scale`). Not saved.
    """

    adapter_layer_names: tuple[str, ...] = ("sam_sparse_delta",)
    other_param_names = ("scaling",)
    scaling: dict[str, float]
    quantization_backend: QuantizationBackend | None
    sam_sparse_delta: nn.ModuleDict
    in_features: int | None
    out_features: int | None
    # name of a parameter that another layer owns too → that layer and its name there, where the delta lives
    _tied: dict[str, tuple[Holder, str]]
    # those that follow this one
    _followers: list[Holder]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scaling = {}
        self.in_features, self.out_features = features(self.get_base_layer())
        self.sam_sparse_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._tied, self._followers = {}, []
        self.register_load_state_dict_post_hook(_prepare_after_loading)

    def tie(self, name: str, owner: Holder, there: str) -> None:
        """Take the deltas of parameter `name`, which `owner` owns as `there`, from that layer."""
        if self not in owner._followers:
            owner._followers.append(self)
        self._tied[name] = (owner, there)

    def update_layer(self, adapter_name: str, names: Iterable[str], inference_mode: bool = False) -> None:
        """Add pending deltas of the parameters of these names."""
        own = self.parameters_below()
        if adapter_name not in self.sam_sparse_delta:
            self.sam_sparse_delta[adapter_name] = Deltas()
        for name in names:
            self._held(adapter_name).put(name, SparseDelta.place_holder(own[name]))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def drop(self, adapter_name: str, name: str) -> None:
        """Remove the delta of one parameter."""
        self._held(adapter_name).drop(name)

    def parameters_below(self) -> dict[str, Tensor]:
        """The parameters that deltas can change, by name relative to the innermost base layer."""
        return own_parameters(self.get_base_layer())

    def is_reached(self) -> bool:
        """Whether an adapter targets this layer, or one that it follows."""
        return any(len(layer.sam_sparse_delta) for layer in self._around())

    def follows(self, name: str) -> bool:
        """Whether the delta of parameter `name` is another layer's."""
        return name in self._tied

    def is_shared(self, name: str) -> bool:
        """Whether other layers own parameter `name`, too."""
        return name in self._tied or any((self, name) in layer._tied.values() for layer in self._followers)

    def deltas(self, adapter_name: str) -> dict[str, SparseDelta]:
        """The deltas of one adapter by parameter name; empty if the adapter does not reach this layer."""
        found: Any = self.sam_sparse_delta._modules.get(adapter_name)
        return {} if found is None else found.by_name()

    def pair(self, adapter_name: str) -> LowRank | None:
        """The low-rank pair beside an adapter's delta of the weight, if there is one."""
        return None

    def reset_pair(self, adapter_name: str) -> None:
        """Have it start."""

    def drop_pair(self, adapter_name: str) -> None:
        """Take it away."""

    def in_force(self, adapter_name: str) -> dict[str, SparseDelta]:
        """The same at the adapter's scale."""
        scale: Any = self.scaling.get(adapter_name)
        found = self.deltas(adapter_name)
        scaled: Any = found if scale is None else {name: ScaledDelta(delta, scale) for name, delta in found.items()}
        return scaled

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's. The layers that this one follows are first: the next active one is chosen among theirs, too."""
        for owner, _ in self._tied.values():
            owner.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted({name for layer in self._around() for name in layer.sam_sparse_delta})

    # The scale of an adapter, under the names by which PEFT and diffusers' `set_adapters(names, weights)` set LoRA's.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Have an adapter's deltas count so many times, unmerged and when it is merged next; 1 is itself."""
        self.scaling.pop(adapter, None)
        if scale != 1 and adapter in self.sam_sparse_delta:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.scaling.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide it; None: have it be 1."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.scaling.get(adapter, 1.0) / scale)

    def _held(self, adapter_name: str) -> Deltas:
        return self.sam_sparse_delta[adapter_name]  # type: ignore[return-value]

    def set_support(
        self,
        adapter_name: str,
        supports: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
        trainable: bool | None = None,
    ) -> None:
        """Give the adapter its support, flat positions per parameter name; parameters not named lose their delta.

        Values start at zero, or from `values`. Parameters whose support has the size it had keep their tensors, so
        that an optimizer that holds them goes on.

        Args:
            trainable: whether parameters that had no delta are trained; None if the adapter is active.
        """
        old, own, deltas = self.deltas(adapter_name), self.parameters_below(), {}
        if trainable is None:
            trainable = adapter_name in self.active_adapters and not self._disable_adapters
        for name, indices in supports.items():
            check_support(indices, own[name].numel(), name)
            deltas[name] = delta_for(own[name], indices, old.get(name), trainable)
            if values is not None:
                with torch.no_grad():
                    deltas[name].values.copy_(values[name])
        self.sam_sparse_delta[adapter_name] = Deltas(deltas)
        self._prepare_all()

    def leave_support(self, adapter_name: str, pending: Mapping[str, SparseDelta]) -> None:
        """Give the adapter the pending deltas back that it had before `set_support`."""
        for delta in pending.values():
            delta.values.data = delta.values.data.new_empty(0)
        self.sam_sparse_delta[adapter_name] = Deltas(pending)
        self._prepare_all()

    def prepare(self) -> None:
        """Derive now what the forward pass needs of the supports: inside torch.compile it would be too late."""
        for adapter_name in {name for layer in self._around() for name in layer.sam_sparse_delta}:
            for name, delta in self._seen(adapter_name).items():
                if not delta.indices.is_meta and not delta.pending:
                    self._prepare(name, delta)

    def _prepare_all(self) -> None:
        for layer in (self, *self._followers):
            if "_modules" in layer.__dict__:
                layer.prepare()

    def _around(self) -> list[Holder]:
        """This layer and those whose deltas it takes; while the model is copied, some may have no state yet."""
        layers = [self, *(owner for owner, _ in self._tied.values())]
        return [layer for layer in layers if "_modules" in layer.__dict__]

    def _prepare(self, name: str, delta: SparseDelta) -> None:
        delta.checked_indices()

    def _apply(self, fn: Any, recurse: bool = True) -> Holder:
        super()._apply(fn, recurse)
        self._prepare_all()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare_all()

    def reset_values(self, adapter_name: str) -> None:
        """Small random deltas instead of zeros (`init_weights=False`)."""
        for delta in self.deltas(adapter_name).values():
            set_to_random(delta)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Only the device: PEFT's version would round the values to the base dtype on the way.
        own = self.parameters_below()
        for name, delta in self.deltas(adapter_name).items():
            if not delta.values.is_meta:
                delta.to(device or own[name].device)
        pair = self.pair(adapter_name)
        if pair is not None and not pair.lora_A.is_meta:
            pair.to(device or own["weight"].device)

    def _seen(self, adapter_name: str) -> dict[str, SparseDelta]:
        """The deltas of this layer and, of parameters that live in another, of that layer while it is not merged."""
        if not self._tied:
            return self.in_force(adapter_name)
        tied = {
            name: owner.in_force(adapter_name).get(there)
            for name, (owner, there) in self._tied.items()
            if "_modules" in owner.__dict__ and not owner.merged
        }
        return self.in_force(adapter_name) | {name: delta for name, delta in tied.items() if delta is not None}
