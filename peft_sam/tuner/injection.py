"""Putting a sparse adapter into a network, and taking it out again if that fails.

A `tuner` here is PEFT's: a `SamModel`, or a MixedModel that holds sparse adapters among others.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_sam._peft import BaseTunerLayer, file_follows
from peft_sam.config import SamConfig
from peft_sam.files.fingerprint import check_base
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import (
    base_modules,
    base_name,
    deltas_of,
    has_support,
    layers_with,
    pairs_of,
    sam_layers,
)
from peft_sam.layers.linear import SamLinear
from peft_sam.layers.make import make_layer
from peft_sam.layers.owned import own_parameters, read_not_called
from peft_sam.selection import Selection
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
from peft_sam.tuner.targets import is_target, named_parameters
from peft_sam.tuner.ties import loosen, shared_parameters, tie


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
    try:
        if state_dict is not None:
            target_as(state_dict, config, model)
        loosen(model, config.modules_to_save or ())
        injected(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        _adapt_inside_layers(tuner, model, adapter_name, config)
        _tie(tuner, model)
        _drop_shared_pairs(model, adapter_name)
        _warn_of_no_pairs(model, adapter_name, config)
        take_states(model)
        remember_buffers(model)
        _share(model)
        if config.selection is not None and renamed is None:
            check_base(sam_layers(model), config.fingerprints, config.strict_base)
        low_cpu_mem_usage = low_cpu_mem_usage or _made_empty(model, adapter_name)
        if state_dict is not None:
            support_as(state_dict, config, model, adapter_name)
        elif config.selection is None and not config.needs_data and not low_cpu_mem_usage and renamed is None:
            check_weights(model, adapter_name, config.score)
            apply_selection(model, adapter_name, config, choose(candidates_of(model, adapter_name), config))
        if like is not None and has_support(model, like):
            share_support(model, like, adapter_name, config)
        if low_cpu_mem_usage:
            for delta in deltas_of(model, adapter_name).values():
                delta.leave_values_out()
            for pair in pairs_of(model, adapter_name).values():
                pair.to("meta")
    except BaseException:
        withdraw(tuner, adapter_name)
        _tie(tuner, model)
        raise


def withdraw(tuner: Any, adapter_name: str) -> None:
    """Take out an adapter whose injection or loading failed; the model is as it was before."""
    if len(tuner.peft_config) > 1:
        tuner.delete_adapter(adapter_name)
    else:
        for name, module in list(tuner.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(tuner.model.get_submodule(parent), child, module.original_module)
        tuner.unload()
    for parameter in tuner.model.parameters():
        parameter.requires_grad_(id(parameter) in tuner._trainable_before)


def adapt(
    tuner: Any,
    config: SamConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    path: str,
    only: Collection[str] | None = None,
) -> None:
    """Give the module `target`, child `target_name` of `parent`, pending deltas; wrap it if it is not yet.

    A child that its parent reads without calling it is not wrapped: its deltas are the parent's.

    Args:
        only: the parameters of the module that get one; None for all.
    """
    own = own_parameters(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
    own = {name: parameter for name, parameter in own.items() if only is None or name in only}
    if not own:
        return
    above, owner = path.rpartition(".")[0], parent.get_base_layer() if isinstance(parent, SamLayer) else parent
    if above and target_name in read_not_called(owner):
        own = {f"{target_name}.{name}": parameter for name, parameter in own.items()}
        target, path, (above, _, target_name) = parent, above, above.rpartition(".")
        parent = tuner.model.get_submodule(above)
    key = base_name(path)
    reached = _reached({f"{key}.{name}": parameter for name, parameter in own.items()}, config.counts)
    layer = target if isinstance(target, SamLayer) else _wrap(tuner, target, target_name, parent)
    layer.update_layer(
        adapter_name,
        [name.removeprefix(f"{key}.") for name in reached],
        inference_mode=config.inference_mode,
    )
    if config.r is not None and isinstance(layer, SamLinear) and "weight" in own:
        alpha = 2.0 * config.r if config.lora_alpha is None else config.lora_alpha
        how = {"seed": zlib.crc32(f"{config.seed}/{key}".encode()), "zero": config.init_weights}
        # what is in the file brings it, as it does deltas
        layer.add_pair(adapter_name, config.r, alpha, config.lora_dropout, empty=config.counts is not None, **how)


def adapt_parameters(tuner: Any, config: SamConfig, model: nn.Module, adapter_name: str) -> list[str]:
    """Adapt what `target_parameters` names, in the modules that own it; the parameters' names in the base model."""
    found = named_parameters(config, dict(base_modules(model)))
    for path, only in reversed(found.items()):  # a child before its parent: wrapping lengthens the paths below
        above, _, child = path.rpartition(".")
        adapt(tuner, config, adapter_name, model.get_submodule(path), child, model.get_submodule(above), path, only)
    return [f"{base_name(path)}.{name}" for path, only in found.items() for name in only]


def replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in a child's place. Deltas are made on their parameter's device, so there is nothing to move."""
    # a nested target has a parent that was wrapped a moment ago
    setattr(parent.get_base_layer() if isinstance(parent, SamLayer) else parent, name, module)


def _made_empty(model: nn.Module, adapter_name: str) -> bool:
    """Whether PEFT has the adapter's values made on the meta device, for a model that is elsewhere.

    That is how `get_peft_model` passes low_cpu_mem_usage on.
    """
    return any(
        delta.values.is_meta and not layer.parameters_below()[name].is_meta
        for layer in layers_with(model, adapter_name).values()
        for name, delta in layer.deltas(adapter_name).items()
    )


def _wrap(tuner: Any, module: nn.Module, name: str, parent: nn.Module, targeted: bool = True) -> SamLayer:
    layer = make_layer(module, tuner, targeted)
    replace(parent, name, layer)
    return layer


def _adapt_inside_layers(tuner: Any, model: nn.Module, adapter_name: str, config: SamConfig) -> None:
    """Adapt the targets inside modules that an earlier adapter wrapped: PEFT does not look inside its layers."""
    reached = {id(layer.get_base_layer()) for layer in layers_with(model, adapter_name).values()}
    inside = [(path, module) for path, module in base_modules(model) if ".base_layer." in path]
    for path, module in inside:
        if id(module) not in reached and is_target(config, path):
            parent, _, child = path.rpartition(".")
            adapt(tuner, config, adapter_name, model.get_submodule(path), child, model.get_submodule(parent), path)
            tuner.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)


def _drop_shared_pairs(model: nn.Module, adapter_name: str) -> None:
    """Take away the low-rank pairs of weights that several modules own, whether a delta of them is tied or not."""
    weights = [place for places in shared_parameters(model) for place in places if place.parameter == "weight"]
    shared = {base_name(place.module) for place in weights}
    for module in pairs_of(model, adapter_name).keys() & shared:
        sam_layers(model)[module].drop_pair(adapter_name)


def _warn_of_no_pairs(model: nn.Module, adapter_name: str, config: SamConfig) -> None:
    if config.r is not None and not pairs_of(model, adapter_name):
        warnings.warn(
            f"adapter {adapter_name!r} has r={config.r} and no low-rank pair: none of its targets is a linear layer "
            "with a weight of its own (one that is tied, or read without a call, is not). Only entries are trained.",
            stacklevel=2,
        )


def _share(model: nn.Module) -> None:
    """Put each layer in all the places that its module has in the network."""
    layers = {id(layer.base_layer): layer for layer in sam_layers(model).values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            layer = layers.get(id(child))
            if layer is not None and layer is not parent:
                parent._modules[name] = layer


def unshare(model: nn.Module) -> None:
    """Put the modules back in the places where PEFT, which sees one of each, has left their layers."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, SamLayer):
                parent._modules[name] = child.get_base_layer()


def _tie(tuner: Any, model: nn.Module) -> None:
    def wrap(name: str) -> SamLayer:
        module = model.get_submodule(name)
        if isinstance(module, SamLayer):
            return module
        path, _, child = name.rpartition(".")
        layer = _wrap(tuner, module, child, model.get_submodule(path), targeted=False)
        layer.set_adapter(tuner.active_adapters)
        return layer

    for adapter_name, config in tuner.peft_config.items():
        if isinstance(config, SamConfig):
            tie(model, adapter_name, wrap, config)


def _reached(parameters: Mapping[str, Tensor], counts: Mapping[str, int] | None) -> list[str]:
    """The parameters that get a delta: all while the counts are unknown, else those that have one, if they hold it.

    No room is made for what a config announces: what is in the file brings it.
    """
    for name in parameters:
        number = (counts or {}).get(name, 0)
        if number > parameters[name].numel():
            raise ValueError(
                f"adapter_config.json announces {number} entries for {name!r}, which has {parameters[name].numel()}: "
                "the adapter was made for another base model, or the file is damaged."
            )
    return [name for name in parameters if counts is None or name in counts]
