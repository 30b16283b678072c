"""Which adapter is selected for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peft_sam.config import SamConfig
from peft_sam.layers.found import deltas_of, sam_layers


def pending_adapter(model: nn.Module, adapter_name: str | None) -> tuple[str, SamConfig]:
    """The adapter to select for.

    Raises:
        ValueError: if there is none, or it is not pending.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise ValueError(
            f"select_parameters needs a model with a SAM adapter; got a {type(model).__name__} without adapters. "
            "Make one with get_peft_model(model, SamConfig(...))."
        )
    sparse = [name for name, config in configs.items() if isinstance(config, SamConfig)]
    if adapter_name is None:
        layers = sam_layers(model).values()
        active = [name for layer in layers for name in layer.active_adapters if name in sparse]
        adapter_name = active[0] if active else "default"
    if adapter_name not in sparse:
        raise ValueError(f"there is no SAM adapter {adapter_name!r}; the model's SAM adapters are {sparse}.")
    config = configs[adapter_name]
    pending = any(delta.pending for delta in deltas_of(model, adapter_name).values())
    if config.selection is not None and pending:
        raise ValueError(
            f"adapter {adapter_name!r} was made from the config of a saved adapter and waits for its file. To load "
            "it, use PeftModel.from_pretrained; to select anew, set config.selection = None before get_peft_model."
        )
    if not pending:
        raise ValueError(
            f"the parameters of adapter {adapter_name!r} are already selected, and a SAM adapter chooses once. To "
            "choose anew, delete the adapter and add one, or start from the base model."
        )
    return adapter_name, config
