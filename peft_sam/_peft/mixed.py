"""PEFT's mixed models, with one method more; PEFT's own list of methods is written out in code."""

from __future__ import annotations

from typing import Any

from peft_sam._peft.kind import SAM_SPARSE, is_sparse, tuner
from peft_sam._peft.names import mixed, peft

# a reloaded module finds its own class in place
_Plain: Any = getattr(peft.mixed_model.MixedModel, "plain", peft.mixed_model.MixedModel)


class MixedModel(_Plain):
    """PEFT's, which hands sparse adapters to their own tuner."""

    plain = _Plain

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if is_sparse(peft_config):
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        if is_sparse(peft_config):
            tuner()._prepare_model(self, peft_config, model)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if is_sparse(config):
            tuner()._create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        if is_sparse(peft_config):
            return tuner()._inject_parameters(self, peft_config, *args, **kwargs)
        return super()._inject_parameters(peft_config, *args, **kwargs)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, or that of the sparse tuner on top of it."""
        if is_sparse(self.peft_config[adapter_name]):
            tuner().inject(self, super().inject_adapter, model, adapter_name, *args, **kwargs)
        else:
            super().inject_adapter(model, adapter_name, *args, **kwargs)


def enter_mixed(config_cls: Any, layer_cls: type) -> None:
    """Put it in PEFT's place, and the method in PEFT's lists of what mixed models take."""
    if SAM_SPARSE not in mixed.COMPATIBLE_TUNER_TYPES:
        mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, SAM_SPARSE)
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
        mixed.PREFIXES.append(tuner().prefix)
    if config_cls not in mixed.Configs.__args__:
        mixed.Configs = mixed.Configs | config_cls
        mixed.Layers = (*mixed.Layers, layer_cls)
    peft.mixed_model.MixedModel = MixedModel
