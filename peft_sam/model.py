"""A network plus its layers: PEFT's tuner for SAM sparse adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_sam._peft import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft_sam.arithmetic import Combined, check_combination, combine_heads
from peft_sam.candidates import apply_selection, candidates_of, check_weights, deltas_of, has_support, share_support
from peft_sam.checkpoint import check_others, modules_in, read_file, sam_layers, to_file
from peft_sam.config import SamConfig
from peft_sam.delta import PendingAdapterError, SparseDelta
from peft_sam.fingerprint import check_base, fingerprints
from peft_sam.layer import SamLayer
from peft_sam.layers import make_layer
from peft_sam.mixed import adapters_by_sample, check_samples
from peft_sam.owned import own_parameters
from peft_sam.selection import Selection
from peft_sam.targets import base_modules, base_name, resolve_targets
from peft_sam.ties import tie


class SamModel(BaseTuner):
    """A base model with SAM sparse adapters, made by `get_peft_model(model, SamConfig(...))`.

    Attributes:
        chooser: selects for scores that need no data, from candidates and config. Handed in by the package, since
            how to choose is not the tuner's matter.
    """

    prefix: str = "sam_sparse_"
    tuner_layer_cls = SamLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    chooser: ClassVar[Callable[[Mapping[str, Tensor], SamConfig], Selection]]

    def sparse_deltas(self, adapter_name: str = "default") -> dict[str, SparseDelta]:
        """The deltas of an adapter: parameter name in the unwrapped base model → indices, values, shape.

        Empty while the adapter is pending.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"no adapter {adapter_name!r}; there are {sorted(self.peft_config)}.")
        found = deltas_of(self.model, adapter_name)
        return {name: delta for name, delta in found.items() if not delta.pending}

    # Injection. What is called on `SamModel` rather than on `self` also runs inside PEFT's MixedModel.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, then `finish_injection`; the model is as before if that fails.

        With `state_dict` its keys say which modules are adapted, whatever the config targets. The adapter gets a copy
        of the config, so that one config makes many adapters. Given another adapter's own config, it gets that one's
        support.
        """
        given = self.peft_config[adapter_name]
        like = next((name for name, of in self.peft_config.items() if of is given and name != adapter_name), None)
        self.peft_config[adapter_name] = copy.copy(given)
        self._trainable_before = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if state_dict is not None:
            self.peft_config[adapter_name].target_modules = modules_in(state_dict)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            SamModel.finish_injection(self, model, adapter_name)
            if like is not None and has_support(model, like):
                share_support(model, like, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            self.withdraw(adapter_name)
            raise

    def finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        """Reach the nested targets, tie shared parameters, select if the score needs no data and no file is awaited."""
        config = self.peft_config[adapter_name]
        SamModel._inject_nested(self, model, adapter_name)

        def wrap(name: str) -> SamLayer:
            module = model.get_submodule(name)
            if not isinstance(module, SamLayer):
                module = SamModel._wrap(
                    self, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module
                )
                module.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            return module

        tie(model, adapter_name, wrap, config)
        if config.selection is not None:
            check_base(sam_layers(model), config.fingerprints, config.strict_base)
        elif not config.needs_data:
            check_weights(model, adapter_name, config.score)
            selection = SamModel.chooser(candidates_of(model, adapter_name), config)
            apply_selection(model, adapter_name, config, selection)

    def _inject_nested(self, model: nn.Module, adapter_name: str) -> None:
        """Adapt targets inside a module that an earlier adapter wrapped; PEFT does not look inside its layers."""
        config = self.peft_config[adapter_name]
        for name, _ in list(base_modules(model)):
            layer = model.get_submodule(name)
            reached = isinstance(layer, SamLayer) and adapter_name in layer.sam_sparse_delta
            if ".base_layer." in name and not reached and check_target_module_exists(config, base_name(name)):
                path, child = name.rpartition(".")[::2]
                SamModel._create_and_replace(
                    self, config, adapter_name, layer, child, model.get_submodule(path), current_key=name
                )
                self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def awaits_file(self, adapter_name: str) -> bool:
        """Whether the adapter was made from a saved config, and the file with its deltas has not come yet."""
        return self.peft_config[adapter_name].selection is not None and not has_support(self.model, adapter_name)

    def withdraw(self, adapter_name: str) -> None:
        """Take out an adapter whose injection or loading failed; the model is as it was before."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            for name, module in list(self.model.named_modules()):
                if isinstance(module, ModulesToSaveWrapper):
                    parent, _, child = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, module.original_module)
            self.unload()
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in self._trainable_before)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way in for `adapter_names`: the adapter of each sample of a batch, "__base__" for none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_samples(names, self.peft_config, self.training)
        with adapters_by_sample(self.model, sam_layers(self.model).values(), names):
            yield

    # Arithmetic

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others: a sparse one again, on the union of their supports.

        "linear" is Σ weight · Δ, so negative weights subtract; "ties", "dare_linear", "dare_ties" and
        "magnitude_prune" are those of PEFT, with their `density` and majority signs over the union in a parameter.
        Heads (`modules_to_save`) are combined by what each changed. The new adapter is not active.

        Raises:
            PendingAdapterError: if an adapter has no support yet.
            ValueError: if an adapter does not exist, the new name is taken, or the combination is not known.
        """
        check_combination(len(adapters), weights, combination_type, density)
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already: delete it, or choose another name.")
        for name in adapters:
            if not self.sparse_deltas(name):
                raise PendingAdapterError(name, "combined")
        how: dict[str, Any] = {"weights": weights, "density": density, "majority_sign_method": majority_sign_method}
        combined = Combined(sam_layers(self.model), adapters, combination_type, **how)
        config = copy.copy(self.peft_config[adapters[0]])
        config.target_modules = list(combined.parts)
        config.exclude_modules = config.layers_to_transform = None
        heads = {head for name in adapters for head in self.peft_config[name].modules_to_save or ()}
        config.modules_to_save = sorted(heads) or None
        config.record(combined.summary(), {})
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        combined.put(adapter_name)
        combine_heads(self.model, adapters, adapter_name, combination_type, **how)
        kept = fingerprints(sam_layers(self.model), adapter_name)
        self.peft_config[adapter_name].record(combined.summary(), kept)

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the deltas of adapters (the active ones by default) into the base: into all layers or none.

        Raises:
            PendingAdapterError: if an adapter has no support yet.
            ValueError: with `safe_merge`, if an entry would not be finite.
        """
        layers = self._layers_at_hand()
        if layers is None:
            super().merge_adapter(adapter_names, safe_merge)
            return
        for adapter_name in self.active_adapters if adapter_names is None else adapter_names:
            for layer in layers:
                layer.check_merge(adapter_name, safe_merge)
        for layer in layers:
            layer.merge(safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """Put the original bits back."""
        layers = self._layers_at_hand()
        if layers is None:
            super().unmerge_adapter()
            return
        for layer in layers:
            layer.unmerge()

    def _layers_at_hand(self) -> list[SamLayer] | None:
        """All tuner layers, or None if some are another tuner's or offloaded: PEFT's loops, slower, know how."""
        found = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        layers = [layer for layer in found if isinstance(layer, SamLayer) and not hasattr(layer.base_layer, "_hf_hook")]
        return layers if len(layers) == len(found) else None

    def _prepare_adapter_config(self, peft_config: SamConfig, model_config: dict[str, Any]) -> SamConfig:
        return peft_config

    def _prepare_model(self, peft_config: SamConfig, model: nn.Module) -> None:
        resolve_targets(peft_config, model)

    def _check_tied_modules(self, model: nn.Module, peft_config: SamConfig) -> None:
        """Nothing to warn about: a tied parameter has one delta, which all its uses see."""

    def _check_merge_allowed(self) -> None:
        """Always, for the same reason."""

    def _create_and_replace(
        self,
        peft_config: SamConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        own = own_parameters(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
        if not own:
            return
        key = base_name(current_key)
        entries = _entries({f"{key}.{name}": parameter for name, parameter in own.items()}, peft_config.counts)
        layer = target if isinstance(target, SamLayer) else SamModel._wrap(self, parent, target_name, target)
        layer.update_layer(
            adapter_name,
            {name.removeprefix(f"{key}."): number for name, number in entries.items()},
            coded=peft_config.coded,
            inference_mode=peft_config.inference_mode,
        )

    def _wrap(self, parent: nn.Module, name: str, module: nn.Module) -> SamLayer:
        layer = make_layer(module, self)
        self._replace_module(parent, name, layer, module)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Deltas are made on their parameter's device, so there is nothing to move; a nested target has a parent
        # that was wrapped a moment ago.
        setattr(parent.get_base_layer() if isinstance(parent, SamLayer) else parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Values are float32 on a half-precision base from the start; only the opposite wish needs work.
        if autocast_adapter_dtype:
            return
        for layer in sam_layers(self.model).values():
            own = layer.parameters_below()
            for name, delta in layer.deltas(adapter_name).items():
                delta.to(own[name].dtype)

    # Files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SamConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return to_file(state, sam_layers(model), adapter_name, config.save_dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        before, found, after = key.rpartition(f".sam_sparse_delta.{adapter_name}.")
        return (
            f"{before}.sam_sparse_delta.{after}" if found else super()._remove_adapter_name_from_key(key, adapter_name)
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SamConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's deltas, then put them in the layers with the sizes that the file has."""
        layers = {name: layer for name, layer in sam_layers(model).items() if adapter_name in layer.sam_sparse_delta}
        replaces = has_support(model, adapter_name)
        found = read_file(state_dict, layers, adapter_name, None if replaces else config.counts)
        rest = {key: tensor for key, tensor in state_dict.items() if ".sam_sparse_delta." not in key}
        check_others(rest, model, adapter_name, shapes=replaces)
        for name, layer in layers.items():
            parts = found.get(name, {})
            layer.set_support(
                adapter_name,
                {key: indices for key, (indices, _) in parts.items()},
                {key: values for key, (_, values) in parts.items()},
            )
        counts = {f"{module}.{key}": len(i) for module, parts in found.items() for key, (i, _) in parts.items()}
        if replaces or config.counts != counts:
            config.record({"k": sum(counts.values()), "counts": counts}, fingerprints(layers, adapter_name))
        loaded = {k: t for k, t in model.state_dict().items() if f".sam_sparse_delta.{adapter_name}." in k}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest) | loaded


def _entries(parameters: Mapping[str, Tensor], counts: Mapping[str, int] | None) -> dict[str, int]:
    """Room to make per parameter: none while the counts are unknown, else the counts, if the parameter holds them."""
    if counts is None:
        return dict.fromkeys(parameters, 0)
    known = {name: counts[name] for name in parameters if name in counts}
    for name, number in known.items():
        if number > parameters[name].numel():
            raise ValueError(
                f"adapter_config.json announces {number} entries for {name!r}, which has {parameters[name].numel()}: "
                "the adapter was made for another base model, or the file is damaged."
            )
    return known
