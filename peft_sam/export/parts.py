"""An adapter taken apart for other formats: its deltas, its heads, and the base model without any wrapper."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from torch import Tensor, nn

from peft_sam.config import SamConfig
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import PEFT_PREFIX, base_name, sam_layers
from peft_sam.layers.low_rank import LowRank, Pair, composed_with
from peft_sam.layers.owned import head_of, is_plain, stored_parameter
from peft_sam.sparse.coding import code_length
from peft_sam.sparse.delta import PendingAdapterError, SparseDelta, changed
from peft_sam.tuner.model import SamModel


class Part(NamedTuple):
    """One delta and where it belongs.

    Attributes:
        module, parameter: name of the module in the base model, and of the parameter relative to it.
        layer: the sparse layer around the module.
        delta: without entries where only the low-rank pair changes the weight.
        pair: beside the delta of a weight, if there is one.
    """

    module: str
    parameter: str
    layer: SamLayer
    delta: SparseDelta
    pair: LowRank | None = None

    @property
    def name(self) -> str:
        """The parameter's name in the base model."""
        return f"{self.module}.{self.parameter}"

    @property
    def base(self) -> Tensor:
        """The parameter θ⁰, as it is stored."""
        return stored_parameter(self.layer.get_base_layer(), self.parameter)

    @torch.no_grad()
    def after(self) -> tuple[Tensor | None, Tensor]:
        """The entries of θ⁰ that change, None for all, and what they are in θ⁰ + Δ."""
        base, indices = self.base.detach(), self.delta.checked_indices()
        if self.pair is None:
            return indices, changed(base.take(indices), self.delta.values)
        return None, composed_with(base, [self.delta, Pair(self.pair, 1.0)]).flatten()

    @property
    def readable(self) -> bool:
        """Whether θ⁰ can be read: it is not quantised, offloaded or sharded."""
        return is_plain(self.base)

    def describe(self) -> str:
        """What decides whether a format can hold it, in words."""
        how = str(self.base.dtype).removeprefix("torch.") if self.readable else "not plain in memory"
        tied = ", tied" if self.layer.is_shared(self.parameter) else ""
        return f"{type(self.layer.get_base_layer()).__name__}, {how}{tied}"


class Adapter:
    """A SAM sparse adapter of a model, ready to be written in another format.

    Attributes:
        parts: its deltas, all with a support, in the base model's order.
        pairs: its low-rank pairs.
        layers: all sparse layers of the model.

    Raises:
        TypeError: if the model is no PEFT model with SAM adapters.
        ValueError: if there is no such adapter, or any adapter of the model is merged.
        PendingAdapterError: if the adapter has no support yet.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.base_model, SamModel):
            raise TypeError(
                f"expected a model made by get_peft_model(model, SamConfig(...)) or PeftModel.from_pretrained; got "
                f"{type(model).__name__}. Unwrap it first if Accelerate or DDP has wrapped it."
            )
        if not model.base_model.sparse_deltas(name):
            raise PendingAdapterError(name, "exported")
        layers = sam_layers(model)
        if merged := sorted({merged for layer in layers.values() for merged in layer.merged_adapters}):
            raise ValueError(f"adapters {merged} are merged: call model.unmerge_adapter() first.")
        self.model, self.name, self.layers = model, name, list(layers.values())
        self.config: SamConfig = model.peft_config[name]
        self.parts = [part for module, layer in layers.items() for part in _parts_of(module, layer, name)]
        self.pairs = [part.pair for part in self.parts if part.pair is not None]

    @property
    def base(self) -> nn.Module:
        """The base model inside, its modules still wrapped."""
        base: nn.Module = self.model.base_model.model
        return base

    def module_names(self) -> set[str]:
        """The names of all modules of the base model."""
        return {base_name(name) for name, _ in self.base.named_modules()}

    def bare_base(self, heads: bool = True) -> nn.Module:
        """The base model without wrappers, with this adapter's `heads` or its own: a copy that shares every tensor."""
        shared: Any = {id(tensor): tensor for tensor in chain(self.base.parameters(), self.base.buffers())}
        for module in self.base.modules():  # quantised ones keep tensors elsewhere
            kept = chain(vars(module).values(), *(of.values() for of in vars(module).values() if isinstance(of, dict)))
            shared |= {id(tensor): tensor for tensor in kept if isinstance(tensor, Tensor)}
        # from the inside out, so that a wrapped module inside a wrapped one is unwrapped by then
        for module in reversed(list(self.base.modules())):
            if isinstance(module, SamLayer):
                shared[id(module)] = copy.deepcopy(module.get_base_layer(), shared)
            elif isinstance(module, ModulesToSaveWrapper):
                shared[id(module)] = copy.deepcopy(
                    head_of(module, self.name) if heads else module.original_module, shared
                )
        found = copy.deepcopy(self.base, shared)
        vars(found).pop("peft_config", None)  # PEFT's tuners leave theirs there, and would go on with it
        return found

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained and saved densely (`modules_to_save`)."""
        heads = [head_of(wrapper, self.name) for wrapper in self._head_wrappers().values()]
        return [parameter for head in heads for parameter in head.parameters()]

    def _head_wrappers(self) -> dict[str, ModulesToSaveWrapper]:
        every = self.base.named_modules()
        found = {name: module for name, module in every if isinstance(module, ModulesToSaveWrapper)}
        return {name: wrapper for name, wrapper in found.items() if self.name in wrapper.modules_to_save}

    def named_heads(self) -> list[tuple[str, nn.Parameter]]:
        """The same by name in the base model."""
        heads = {id(parameter) for parameter in self.head_parameters()}
        return [(name, p) for name, p in self.bare_base().named_parameters() if id(p) in heads]

    def own_size(self) -> int:
        """Bytes of the tensors in the adapter's own file."""
        dtype = getattr(torch, self.config.save_dtype) if self.config.save_dtype else None
        deltas = [part.delta for part in self.parts]
        values = sum(len(delta.values) * (dtype or delta.values.dtype).itemsize for delta in deltas)
        codes = sum(code_length(len(delta.values), delta.shape.numel()) for delta in deltas)
        factors = [factor for pair in self.pairs for factor in pair.parameters()]
        pairs = sum(factor.numel() * (dtype or factor.dtype).itemsize for factor in factors)
        return values + codes + pairs + sum(head.nbytes for head in self.head_parameters())

    def refuse_pairs(self, what: str) -> None:
        """Raise a ValueError, for `what` cannot be of an adapter with low-rank pairs, if it has any."""
        if self.pairs:
            raise ValueError(
                f"{what} is of adapters that change single entries, and the low-rank pairs of {self.name!r} "
                f"(r={self.config.r}) change every entry of their layers. Formats 'supertuning', 'lora' and 'merged' "
                "can hold them."
            )

    def refuse_what_is_besides(self) -> None:
        """Raise a ValueError if the adapter is more than entries, pairs and heads: no other form holds that."""
        scaled = {layer.scaling[self.name] for layer in self.layers if self.name in layer.scaling}
        if scaled:
            raise ValueError(
                f"adapter {self.name!r} has a scale ({', '.join(map(str, sorted(scaled)))}), which is not part of it: "
                "set it to 1, or make an adapter of the scaled one, add_weighted_adapter([name], [scale], new_name)."
            )
        if self.config.trainable_token_indices:
            raise ValueError(
                f"adapter {self.name!r} trains rows of embeddings besides (trainable_token_indices), which other "
                "formats cannot hold: use model.merge_and_unload(), and save that."
            )

    def refuse_untied_heads(self) -> None:
        """Raise a ValueError, for new weights go into a base, if a head is a copy of a weight that is tied there."""
        places = Counter(id(parameter) for _, parameter in self.base.named_parameters(remove_duplicate=False))
        for name, wrapper in self._head_wrappers().items():
            if any(places[id(parameter)] > 1 for parameter in wrapper.original_module.parameters()):
                raise ValueError(
                    f"new weights are for a base in which {base_name(name)!r} is tied, and adapter {self.name!r} has "
                    "trained a copy of it (modules_to_save). Format 'merged' and those of stock PEFT can hold both."
                )

    def saved_besides(self, adapted: Collection[str]) -> dict[str, Tensor]:
        """What PEFT saves besides the deltas, under its names: heads, and embeddings whose vocabulary was resized.

        Args:
            adapted: the modules that are wrapped in the other format, too.
        """
        state = {key: t for key, t in self.model.state_dict().items() if ".sam_sparse_" not in key}
        found = get_peft_model_state_dict(self.model, state_dict=state, adapter_name=self.name)
        wrapped = tuple(f"{PEFT_PREFIX}{module}.base_layer." for module in adapted)
        return {key if key.startswith(wrapped) else base_name(key): tensor for key, tensor in found.items()}

    def common_fields(self) -> dict[str, Any]:
        """The fields that the config of any kind of adapter has, for the config of another kind."""
        fields = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
        found = {field: copy.copy(getattr(self.config, field)) for field in fields}
        return {**found, "inference_mode": True}

    def auto_mapping(self) -> dict[str, str] | None:
        """What PEFT notes of the class of a base model without task type."""
        if self.config.task_type is not None:
            return None
        base = type(self.model.get_base_model())
        return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _parts_of(module: str, layer: SamLayer, adapter_name: str) -> list[Part]:
    deltas, pair = layer.deltas(adapter_name), layer.pair(adapter_name)
    if pair is not None and "weight" not in deltas:
        deltas["weight"] = SparseDelta.place_holder(layer.parameters_below()["weight"])
    return [Part(module, name, layer, delta, pair if name == "weight" else None) for name, delta in deltas.items()]
