"""A network plus its layers: PEFT's tuner for SAM sparse adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_sam._peft import BaseTuner, BaseTunerLayer
from peft_sam.config import SamConfig
from peft_sam.files.checkpoint import split, to_file
from peft_sam.files.embeddings import embeddings_to_save
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import deltas_of, has_support, pairs_of, sam_layers
from peft_sam.layers.mixed import Samples, adapters_by_sample, check_samples
from peft_sam.selection import Selection
from peft_sam.sparse.delta import SparseDelta
from peft_sam.tuner.adapting import adapt, adapt_parameters, replace
from peft_sam.tuner.arithmetic import add_combined, changing
from peft_sam.tuner.embeddings import check_ties
from peft_sam.tuner.filling import fill
from peft_sam.tuner.injection import inject, withdraw
from peft_sam.tuner.moved import warn_of_moved
from peft_sam.tuner.states import leave_states
from peft_sam.tuner.targets import is_target, resolve_targets
from peft_sam.tuner.ties import unshare


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
        return {name: delta for name, delta in deltas_of(self.model, adapter_name).items() if not delta.pending}

    # Injection. What is called on `SamModel` rather than on `self` also runs inside PEFT's MixedModel.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adapt the modules that the adapter's config targets (`injection.inject`)."""
        SamModel.inject(
            self, super().inject_adapter, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )

    def inject(self, injected: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """The same on top of `injected`, the injection of the tuner's own class."""
        inject(self, injected, SamModel.chooser, *args, **kwargs)

    def awaits_file(self, adapter_name: str) -> bool:
        """Whether the adapter was made from a saved config, and the file with its deltas has not come yet."""
        return self.peft_config[adapter_name].selection is not None and not has_support(self.model, adapter_name)

    def stay_at_hand(self, adapter_name: str) -> None:
        """Keep the deltas and pairs of a loaded adapter in memory, where PEFT has offloaded them with their layers."""
        for delta in deltas_of(self.model, adapter_name).values():
            delta.stay_at_hand()
        for pair in pairs_of(self.model, adapter_name).values():
            pair.stay_at_hand()

    def withdraw(self, adapter_name: str) -> None:
        """Take out an adapter whose loading failed."""
        withdraw(self, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way in for `adapter_names`: the adapter of each sample of a batch, "__base__" for none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_samples(names, self.peft_config, self.training)
        with adapters_by_sample(sam_layers(self.model), Samples(self.model, names, args, kwargs)):
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
        "magnitude_prune" are those of PEFT, with their `density` and majority signs over the union in a parameter. Each
        Δ has the scale that it is set to (`set_scale`).
        Heads (`modules_to_save`) are combined by what each changed, and low-rank pairs, for "linear" alone, into one of
        the sum of their ranks. The new adapter is not active.

        A pending adapter has changed nothing, and counts as nothing, with a warning; if all are pending, so is the new
        one. That is what PEFT's other methods do with adapters that are not trained yet, which are zero, too.

        Raises:
            PendingAdapterError: if an adapter waits for its file.
            ValueError: if an adapter does not exist, the new name is taken, the combination is not known, or an adapter
                trains rows of embeddings (`trainable_token_indices`).
        """
        how = {"weights": weights, "density": density, "majority_sign_method": majority_sign_method}
        add_combined(self, adapters, adapter_name, combination_type, how)

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the deltas of adapters (the active ones by default) into the base: into all layers or none.

        A pending adapter merges as nothing, with a warning: its forward is the base's, and so is that of the merged
        model, as of PEFT's other methods before training.

        Raises:
            ValueError: with `safe_merge`, if an entry would not be finite.
        """
        layers = self._layers_at_hand()
        self._check_merge(adapter_names, safe_merge)
        if layers is None:
            super().merge_adapter(adapter_names, safe_merge)
            return
        for layer in layers:
            layer.merge(safe_merge, adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """PEFT's, for `unload` and `merge_and_unload`: if an adapter cannot be merged, the model stays as it is."""
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        leave_states(model)
        unshare(model)
        return model

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        for layer in sam_layers(self.model).values():
            if not hasattr(layer.base_layer, "_hf_hook"):  # offloaded ones are checked one by one
                layer.check_merge([name for name in names if name not in layer.merged_adapters], safe_merge)
        changing(sam_layers(self.model), names, "merged")

    def unmerge_adapter(self) -> None:
        """Put the original bits back."""
        layers = self._layers_at_hand()
        if layers is None:
            super().unmerge_adapter()
            return
        for layer in [layer for layer in layers if layer.merged] or layers[:1]:  # which warns that there is none
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

    @staticmethod
    def _check_target_module_exists(peft_config: SamConfig, key: str) -> Any:
        return is_target(peft_config, key)

    def _check_tied_modules(self, model: nn.Module, peft_config: SamConfig) -> None:
        """Tie what is to be tied, and warn of tied word embeddings that the config names."""
        if said := check_ties(self, peft_config):
            warnings.warn(said, stacklevel=2)

    def _check_merge_allowed(self) -> None:
        """Always; with PEFT's warning where an adapter names tied word embeddings."""
        configs = [config for config in self.peft_config.values() if isinstance(config, SamConfig)]
        if any(config.names_tied for config in configs):
            super()._check_merge_allowed()

    def _create_and_replace(
        self,
        peft_config: SamConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        adapt(self, peft_config, adapter_name, target, target_name, parent, current_key)

    def _inject_parameters(
        self, peft_config: SamConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        return adapt_parameters(self, peft_config, model, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        replace(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Values are float32 on a half-precision base from the start; only the opposite wish needs work.
        if autocast_adapter_dtype:
            return
        for layer in sam_layers(self.model).values():
            for name, delta in layer.deltas(adapter_name).items():
                delta.to(layer.parameters_below()[name].dtype)
            if (pair := layer.pair(adapter_name)) is not None:
                pair.to(layer.parameters_below()["weight"].dtype)

    # Files

    @staticmethod
    def embeddings_to_save(model: nn.Module, adapter_name: str, state: Any, save: Any) -> dict[str, Tensor]:
        """What of the base's embeddings belongs in the file of an adapter (`files.embeddings`)."""
        configs: Any = model.peft_config
        return embeddings_to_save(model, configs[adapter_name], adapter_name, state, save)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SamConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        warn_of_moved(model)
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # of modules that another adapter trains densely, which PEFT passes over
        originals = {key: t for key, t in state_dict.items() if split(key, adapter_name)[1]}
        return to_file(state | originals, sam_layers(model), adapter_name, config.save_dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # all other keys are without it: PEFT's way would take `weight` for the name of an adapter that has it
        before, kind, after = split(key, adapter_name)
        return f"{before}.{kind}.{after}" if kind else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SamConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors, then put them in the model, deltas with the sizes that the file has (`filling`)."""
        rest = fill(model, config, adapter_name, state_dict)
        loaded = {key: t for key, t in model.state_dict().items() if split(key, adapter_name)[1]}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest) | loaded
