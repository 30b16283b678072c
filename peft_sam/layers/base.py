"""A module plus its deltas: right for any module, which is run with its parameters replaced by θ + Δ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_sam._peft import BaseTunerLayer, QuantizationBackend, check_adapters_to_merge
from peft_sam.layers.deltas import Deltas, delta_for, set_to_random
from peft_sam.layers.merging import Change, check_merge, merge, restore
from peft_sam.layers.mixed import BASE
from peft_sam.layers.owned import features, is_plain, own_parameters, stored_parameters
from peft_sam.layers.substitute import call_with
from peft_sam.sparse.delta import PendingAdapterError, SparseDelta
from peft_sam.sparse.ops import compose
from peft_sam.sparse.support import check_support


def _prepare_after_loading(layer: SamLayer, _: Any) -> None:
    layer.prepare()


class SamLayer(nn.Module, BaseTunerLayer):
    """Any module, run with θ + Δ in place of its parameters.

    Attributes:
        quantization_backend: PEFT's access to the weight of a quantised linear layer, else None.
        base_layer: the module; its parameters are never written, except by `merge`.
        sam_sparse_delta: adapter name → parameter name (relative to the module) → `SparseDelta`.
        in_features, out_features: of the module, or None if it has no such numbers.
        sample_adapters: runs this layer while samples have adapters of their own (`mixed`); else None.
    """

    adapter_layer_names = ("sam_sparse_delta",)
    quantization_backend: QuantizationBackend | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(self.get_base_layer())
        self.sam_sparse_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._merged_changes: list[list[Change]] = []
        self._selecting = False
        self.sample_adapters: Callable[..., Any] | None = None
        # name of a parameter that another layer owns too → that layer and its name there, where the delta lives
        self._tied: dict[str, tuple[SamLayer, str]] = {}
        # those that follow this one: layer, name there, name here
        self._followers: list[tuple[SamLayer, str, str]] = []
        self.register_load_state_dict_post_hook(_prepare_after_loading)

    # Adapters

    def tie(self, name: str, owner: SamLayer, there: str) -> None:
        """Take the deltas of parameter `name`, which `owner` owns as `there`, from that layer."""
        if name not in self._tied:
            owner._followers.append((self, name, there))
        self._tied[name] = (owner, there)

    def update_layer(
        self, adapter_name: str, entries: Mapping[str, int], coded: bool = True, inference_mode: bool = False
    ) -> None:
        """Add pending deltas with room for so many entries per parameter: 0 while that is not known.

        Without `coded` a file of format 1 is awaited.
        """
        own = self.parameters_below()
        if adapter_name not in self.sam_sparse_delta:
            self.sam_sparse_delta[adapter_name] = Deltas()
        for name, number in entries.items():
            self._held(adapter_name).put(name, SparseDelta.place_holder(own[name], number, coded))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def drop(self, adapter_name: str, name: str) -> None:
        """Remove the delta of one parameter."""
        self._held(adapter_name).drop(name)

    def parameters_below(self) -> dict[str, Tensor]:
        """The parameters that deltas can change, by name relative to the innermost base layer."""
        return own_parameters(self.get_base_layer())

    def is_shared(self, name: str) -> bool:
        """Whether other layers own parameter `name`, too."""
        return name in self._tied or any(here == name for _, _, here in self._followers)

    def deltas(self, adapter_name: str) -> dict[str, SparseDelta]:
        """The deltas of one adapter by parameter name; empty if the adapter does not reach this layer."""
        found: Any = self.sam_sparse_delta._modules.get(adapter_name)
        return {} if found is None else found.by_name()

    def _held(self, adapter_name: str) -> Deltas:
        return self.sam_sparse_delta[adapter_name]  # type: ignore[return-value]

    def set_support(
        self, adapter_name: str, supports: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Give the adapter its support, flat positions per parameter name; parameters not named lose their delta.

        Values start at zero, or from `values`. Parameters whose support has the size it had keep their tensors, so
        that an optimizer that holds them goes on.
        """
        old, own, deltas = self.deltas(adapter_name), self.parameters_below(), {}
        trainable = adapter_name in self.active_adapters and not self._disable_adapters
        for name, indices in supports.items():
            check_support(indices, own[name].numel(), name)
            deltas[name] = delta_for(own[name], indices, old.get(name), trainable)
            if values is not None:
                with torch.no_grad():
                    deltas[name].values.copy_(values[name])
        self.sam_sparse_delta[adapter_name] = Deltas(deltas)
        self.prepare()

    def prepare(self) -> None:
        """Derive now what the forward pass needs of the supports: inside torch.compile it would be too late."""
        for adapter_name in self.sam_sparse_delta:
            for name, delta in self.deltas(adapter_name).items():
                if not delta.indices.is_meta and not delta.pending:
                    self._prepare(name, delta)
                    for layer, name_there, name_here in self._followers:
                        if name_here == name:
                            layer._prepare(name_there, delta)

    def _prepare(self, name: str, delta: SparseDelta) -> None:
        delta.checked_indices()

    def _apply(self, fn: Any, recurse: bool = True) -> SamLayer:
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

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

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with θ + Σ Δ over the active adapters; without Δ if merged or disabled."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.sample_adapters is not None:
            return self.sample_adapters(self, args, kwargs)
        changes = {} if self.merged else self._deltas_of(self.active_adapters)
        if not changes:
            return self.base_layer(*args, **kwargs)
        return self._forward_with(changes, *args, **kwargs)

    def forward_as(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """The output with the deltas of one adapter, active or not; without any for "__base__"."""
        changes = self._deltas_of([] if adapter_name == BASE else [adapter_name])
        return self._forward_with(changes, *args, **kwargs) if changes else self.base_layer(*args, **kwargs)

    def reached_by(self, adapter_name: str) -> bool:
        """Whether an adapter changes this module."""
        return adapter_name != BASE and bool(self._deltas_of([adapter_name]))

    def _deltas_of(self, adapter_names: Iterable[str]) -> dict[str, list[SparseDelta]]:
        """The deltas of adapters by parameter name, in the order of their names."""
        changes: dict[str, list[SparseDelta]] = {}
        for adapter_name in adapter_names:
            mine = self.deltas(adapter_name)
            for name, delta in (mine | self._tied_deltas(adapter_name) if self._tied else mine).items():
                if not delta.pending:
                    changes.setdefault(name, []).append(delta)
                elif self.training and torch.is_grad_enabled() and not self._selecting:
                    raise PendingAdapterError(adapter_name, "trained")
        return changes

    def _tied_deltas(self, adapter_name: str) -> dict[str, SparseDelta]:
        found = {
            name: owner.deltas(adapter_name).get(there)
            for name, (owner, there) in self._tied.items()
            if adapter_name not in owner.merged_adapters
        }
        return {name: delta for name, delta in found.items() if delta is not None}

    def _forward_with(self, changes: Mapping[str, list[SparseDelta]], *args: Any, **kwargs: Any) -> Any:
        own, prefix = stored_parameters(self.get_base_layer()), self._path_to_innermost()
        for name in changes:
            if not is_plain(own[name]):
                raise ValueError(
                    f"{type(self.get_base_layer()).__name__}.{name} is quantised or offloaded, and only linear layers "
                    "called with one argument can add a delta to their output. Leave the module out with "
                    "exclude_modules, or keep it in memory in full precision."
                )
        composed = {prefix + name: compose(own[name], deltas) for name, deltas in changes.items()}
        return call_with(self.base_layer, composed, args, kwargs)

    def _path_to_innermost(self) -> str:
        """The path from `base_layer` to the innermost one, when another tuner's layer lies between."""
        path = ""
        module: Any = self.base_layer
        while hasattr(module, "base_layer"):
            path, module = f"{path}base_layer.", module.base_layer
        return path

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write θ + Δ into the base parameters, keeping the original bits of the entries that change.

        Raises:
            ValueError: with `safe_merge`, if an entry would not be finite; nothing is written then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.sam_sparse_delta:
                self.check_merge(adapter_name, safe_merge)
                changes = merge(self.get_base_layer(), self.deltas(adapter_name), self.quantization_backend)
                self._merged_changes.append(changes)
                self.merged_adapters.append(adapter_name)

    def check_merge(self, adapter_name: str, safe_merge: bool) -> None:
        """Raise what `merge` would."""
        check_merge(
            self.get_base_layer(), adapter_name, self.deltas(adapter_name), safe_merge, self.quantization_backend
        )

    def unmerge(self) -> None:
        """Put the original bits back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            restore(self.get_base_layer(), self._merged_changes.pop())

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its deltas, merged or not, at every depth (PEFT's hook for unloading)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        base = self.get_base_layer()
        for name, inner in list(base.named_modules()):
            if isinstance(inner, SamLayer):
                bare = inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, bare)
        return base

    # Looks

    def __getattr__(self, name: str) -> Any:
        # Model code reads attributes of its modules (`embed.padding_idx`, `experts.num_experts`) and looks up their
        # children; private names stay private, since hooks keep their state there, but for one that torch's encoder
        # layers read of their attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "sam_sparse." + super().__repr__()


@contextmanager
def selecting(layers: Iterable[SamLayer]) -> Iterator[None]:
    """Let pending adapters run in train mode, for the pass that selects their parameters."""
    layers = list(layers)
    for layer in layers:
        layer._selecting = True
    try:
        yield
    finally:
        for layer in layers:
            layer._selecting = False
