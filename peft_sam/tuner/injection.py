"""Putting a sparse adapter into a network, and taking it out again if that fails.

A `tuner` here is PEFT's: a `SamModel`, or a MixedModel that holds sparse adapters among others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_sam._peft import file_follows
from peft_sam.config import SamConfig
from peft_sam.files.fingerprint import check_base
from peft_sam.layers.found import deltas_of, has_support, layer_in, layers_with, pairs_of, sam_layers
from peft_sam.selection import Selection
from peft_sam.tuner.adapting import adapt_inside_layers
from peft_sam.tuner.candidates import (
    apply_selection,
    candidates_of,
    check_weights,
    share_support,
    support_as,
    target_as,
)
from peft_sam.tuner.moved import remember_buffers
from peft_sam.tuner.states import take_states
from peft_sam.tuner.ties import drop_shared_pairs, loosen, share, take_off, tie


def inject(
    tuner: Any,
    injected: Callable[..., None],
    choose: Callable[[Mapping[str, Tensor], SamConfig], Selection],
    model: nn.Module,
    adapter_name: str,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """PEFT's injection, `injected`, and what a sparse adapter needs besides; the model is as before if that fails.

    The adapter gets a copy of the config, so that one config makes many adapters. With `state_dict` its support is the
    one found there, whatever the config says. Otherwise, if the score needs no data and no file is awaited, it is
    chosen now; with `low_cpu_mem_usage` it is left to what will be loaded, and the values are on the meta device.

    Raises:
        ValueError: if the config, the state dict and the model do not fit.
    """
    given = tuner.peft_config[adapter_name]
    like = next((name for name, config in tuner.peft_config.items() if config is given and name != adapter_name), None)
    config = tuner.peft_config[adapter_name] = given.for_one_adapter()
    renamed = file_follows.get()
    if renamed is not None:
        config.rename(renamed)
    tuner._trainable_before = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tuner._layers_before = {id(layer) for layer in sam_layers(model).values()}
    try:
        if state_dict is not None:
            target_as(state_dict, config, model)
        loosen(model, config.modules_to_save or ())
        _check_heads(model, adapter_name, config)
        injected(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        _complete(tuner, model, adapter_name, config)
        if config.selection is not None and renamed is None:
            check_base(sam_layers(model), config.fingerprints, config.strict_base)
        left_to_file = low_cpu_mem_usage or _made_empty(model, adapter_name)
        if state_dict is not None:
            support_as(state_dict, config, model, adapter_name)
        elif config.selection is None and not config.needs_data and not left_to_file and renamed is None:
            check_weights(model, adapter_name, config.score)
            apply_selection(model, adapter_name, config, choose(candidates_of(model, adapter_name), config))
        if like is not None and has_support(model, like):
            share_support(model, like, adapter_name, config)
        if left_to_file:
            _leave_values_out(model, adapter_name)
    except BaseException:
        withdraw(tuner, adapter_name)
        raise


def withdraw(tuner: Any, adapter_name: str) -> None:
    """Take out an adapter whose injection or loading failed; the model is as it was before."""
    if len(tuner.peft_config) > 1:
        tuner.delete_adapter(adapter_name)
        for layer in sam_layers(tuner.model).values():
            if id(layer) not in tuner._layers_before and not layer.is_reached():
                take_off(tuner.model, layer)
        tie(tuner, tuner.model)  # what was loosened for it
    else:
        for name, module in list(tuner.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(tuner.model.get_submodule(parent), child, module.original_module)
        tuner.unload()
    for parameter in tuner.model.parameters():
        parameter.requires_grad_(id(parameter) in tuner._trainable_before)


def _check_heads(model: nn.Module, adapter_name: str, config: SamConfig) -> None:
    """Whether the modules that an adapter trains densely, as one before it does, have no sparse changes since.

    PEFT would copy these with the module.
    """
    dense = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        wanted = isinstance(module, ModulesToSaveWrapper) and name.endswith(dense)
        if wanted and layer_in(module.original_module) is not None:
            raise ValueError(
                f"adapter {adapter_name!r} has {name!r} in modules_to_save, and another adapter targets it: add those "
                "that train a module densely before those that target it, or take it out of one of them."
            )


def _complete(tuner: Any, model: nn.Module, adapter_name: str, config: SamConfig) -> None:
    """What PEFT's injection leaves undone: targets inside layers, ties, and what the model keeps for its adapters."""
    adapt_inside_layers(tuner, model, adapter_name, config)
    tie(tuner, model)
    drop_shared_pairs(model, adapter_name)
    _warn_of_no_pairs(model, adapter_name, config)
    take_states(model)
    remember_buffers(model)
    share(model)


def _made_empty(model: nn.Module, adapter_name: str) -> bool:
    """Whether PEFT has the adapter's values made on the meta device, for a model that is elsewhere.

    That is how `get_peft_model` passes low_cpu_mem_usage on.
    """
    return any(
        delta.values.is_meta and not layer.parameters_below()[name].is_meta
        for layer in layers_with(model, adapter_name).values()
        for name, delta in layer.deltas(adapter_name).items()
    )


def _leave_values_out(model: nn.Module, adapter_name: str) -> None:
    for delta in deltas_of(model, adapter_name).values():
        delta.leave_values_out()
    for pair in pairs_of(model, adapter_name).values():
        pair.to("meta")


def _warn_of_no_pairs(model: nn.Module, adapter_name: str, config: SamConfig) -> None:
    if config.r is not None and not pairs_of(model, adapter_name):
        warnings.warn(
            f"adapter {adapter_name!r} has r={config.r} and no low-rank pair: none of its targets is a linear layer "
            "with a weight of its own (one that is tied, or read without a call, is not). Only entries are trained.",
            stacklevel=2,
        )
