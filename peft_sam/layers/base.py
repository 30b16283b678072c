"""A module plus its deltas: right for any module, which is run with its parameters replaced by θ + Δ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import check_adapters_to_merge
from peft_sam.layers.holder import Holder
from peft_sam.layers.low_rank import Changes, Pair, composed_with
from peft_sam.layers.merging import Change, check_merge, merge, restore, without
from peft_sam.layers.mixed import BASE
from peft_sam.layers.owned import is_packed_linear, is_plain, stored_parameters
from peft_sam.layers.substitute import call_with
from peft_sam.sparse.delta import PendingAdapterError, SparseDelta, delta_dtype
from peft_sam.sparse.ops import DenseGradient


class SamLayer(Holder):
    """Any module, run with θ + Δ in place of its parameters.

    Attributes:
        quantization_backend: PEFT's access (`resolve_quantization_backend`) to the weight of a quantised linear layer,
            else None.
        sample_adapters: runs this layer while samples have adapters of their own (`mixed`); else None.
        sample_names: theirs.
    """

    sample_adapters: Callable[..., Any] | None
    sample_names: Sequence[str]
    _selecting: bool
    _merged_changes: list[list[Change]]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.sample_adapters, self.sample_names = None, ()
        self._merged_changes = []
        self._selecting = False

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with θ + Σ Δ over the active adapters; without Δ if merged or disabled."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.sample_adapters is not None:
            return self._mixed_batch_forward(*args, **kwargs)
        changes = {} if self.merged else self._deltas_of(self.active_adapters)
        if not changes:
            return self.base_layer(*args, **kwargs)
        return self._forward_with(changes, *args, **kwargs)

    def _mixed_batch_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output with the adapter of each sample (PEFT looks for this name to tell who can do that)."""
        assert self.sample_adapters is not None
        return self.sample_adapters(self, args, kwargs)

    def forward_as(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """The output with the deltas of one adapter, active or not; without any for "__base__"."""
        changes = self._deltas_of([] if adapter_name == BASE else [adapter_name])
        return self._forward_with(changes, *args, **kwargs) if changes else self.base_layer(*args, **kwargs)

    def reached_by(self, adapter_name: str) -> bool:
        """Whether an adapter changes this module."""
        return adapter_name != BASE and bool(self._deltas_of([adapter_name]))

    def pair_in_force(self, adapter_name: str) -> Pair | None:
        """The same at the adapter's scale; None while the adapter is pending, or waits for its file."""
        found, deltas = self.pair(adapter_name), self.deltas(adapter_name).values()
        if found is None or any(delta.pending for delta in deltas) or (found.lora_A.is_meta and not deltas):
            return None
        return Pair(found, self.scaling.get(adapter_name, 1.0))

    def _deltas_of(self, adapter_names: Iterable[str]) -> Changes:
        """The deltas of adapters by parameter name, in the order of their names; low-rank pairs among the weight's."""
        changes: dict[str, list[SparseDelta | Pair]] = {}
        for adapter_name in adapter_names:
            for name, delta in self._seen(adapter_name).items():
                if not delta.pending:
                    changes.setdefault(name, []).append(delta)
                elif self.training and torch.is_grad_enabled() and not self._selecting:
                    raise PendingAdapterError(adapter_name, "trained")
            if (pair := self.pair_in_force(adapter_name)) is not None:
                changes.setdefault("weight", []).append(pair)
        return changes

    def _forward_with(self, changes: Changes, *args: Any, **kwargs: Any) -> Any:
        own = stored_parameters(self.get_base_layer())
        for name in changes:
            if not is_plain(own[name]):
                raise ValueError(
                    f"{type(self.get_base_layer()).__name__}.{name} is quantised or offloaded, and only linear layers "
                    "called with one argument can add a delta to their output. Leave the module out with "
                    "exclude_modules, or keep it in memory in full precision."
                )
        prefix = self._path_to_innermost()
        composed = {prefix + name: self._composed(own[name], deltas) for name, deltas in changes.items()}
        return call_with(self.base_layer, composed, args, kwargs)

    def _composed(self, parameter: Tensor, deltas: Sequence[SparseDelta | Pair]) -> Tensor:
        found = composed_with(parameter, deltas)
        sparse = getattr(self.get_base_layer(), "sparse", False) is True
        return DenseGradient.apply(found) if sparse else found

    def composed(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """θ + Σ Δ of the plain parameters that are wanted, as `forward` computes with them.

        Raises:
            ValueError: if the samples of the batch have several adapters.
        """
        if self.disable_adapters or self.merged:
            return {}
        names = self.active_adapters if self.sample_adapters is None else list(dict.fromkeys(self.sample_names))
        own = stored_parameters(self.get_base_layer())
        changes = {
            name: deltas
            for name, deltas in self._deltas_of(name for name in names if name != BASE).items()
            if wanted(name) and is_plain(own[name])
        }
        if changes and len(names) > 1 and self.sample_adapters is not None:
            raise ValueError(
                f"adapter_names gives the samples of a batch several adapters, and {next(iter(changes))!r} of a "
                f"{type(self.get_base_layer()).__name__} is read by another module, for all samples together: leave "
                "the module out with exclude_modules, or give each batch one adapter."
            )
        return {name: self._composed(own[name], deltas) for name, deltas in changes.items()}

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
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sam_sparse_delta]
        self.check_merge(names, safe_merge)
        for adapter_name in names:
            deltas, pair = self.in_force(adapter_name), self.pair_in_force(adapter_name)
            self._merged_changes.append(merge(self.get_base_layer(), deltas, pair, self.quantization_backend))
            self.merged_adapters.append(adapter_name)

    def check_merge(self, adapter_names: Iterable[str], safe_merge: bool) -> None:
        """Raise what merging adapters that are not merged would, one after the other."""
        adapters = {name: (self.in_force(name), self.pair_in_force(name)) for name in adapter_names}
        check_merge(self.get_base_layer(), adapters, safe_merge, self.quantization_backend)

    def unmerge(self) -> None:
        """Put the original bits back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            restore(self.get_base_layer(), self._merged_changes.pop())

    def unmerged(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter `name`, read as `tensor`, with its original bits; it stays merged."""
        for changes in reversed(self._merged_changes):
            tensor = without(changes, name, tensor)
        return tensor

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its deltas, merged or not, at every depth (PEFT's hook for unloading)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        base = self.get_base_layer()
        _unload_below(base, lambda inner: inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
        return base

    # Conversion to LoRA, by PEFT's `convert_to_lora`

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the weights of a LoRA adapter could say what this one changes: in linear layers, all but biases.

        Warns if it is only the biases that stand in the way.
        """
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) and not is_packed_linear(base):
            return False
        seen = self._seen(adapter_name)
        biases = any(bool(delta.values.any()) for name, delta in seen.items() if name != "weight" and not delta.pending)
        if biases:
            warnings.warn(
                f"The adapter {adapter_name!r} changes biases, which PEFT's conversion to LoRA cannot hold: "
                'peft_sam.export_adapter(model, path, "lora") writes LoRA files with them.',
                stacklevel=2,
            )
        return not biases

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Δ of the weight of a linear layer, dense, at the adapter's scale."""
        weight = self.parameters_below()["weight"]
        whole = torch.zeros(weight.shape, dtype=delta_dtype(weight.dtype), device=weight.device)
        delta = self._seen(adapter_name).get("weight")
        if delta is not None and not delta.pending:
            whole = whole.flatten().index_copy(0, delta.checked_indices(), delta.values).view(whole.shape)
        pair = self.pair_in_force(adapter_name)
        return whole if pair is None else whole + pair.dense()

    def __repr__(self) -> str:
        return "sam_sparse." + super().__repr__()


def _unload_below(module: nn.Module, unload: Callable[[SamLayer], nn.Module]) -> None:
    """Put in the place of each sparse layer in a module, at every depth, what `unload` makes of it."""
    for name, child in module._modules.items():
        if isinstance(child, SamLayer):
            module._modules[name] = unload(child)
        elif child is not None:
            _unload_below(child, unload)


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
