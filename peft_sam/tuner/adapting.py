"""Giving modules the pending deltas and low-rank pairs of an adapter.

A `tuner` here is PEFT's: a `SamModel`, or a MixedModel that holds sparse adapters among others.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from peft_sam._peft import BaseTunerLayer
from peft_sam.config import SamConfig
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import base_modules, base_name, layer_in, layers_with
from peft_sam.layers.linear import SamLinear
from peft_sam.layers.make import make_layer
from peft_sam.layers.owned import own_parameters, parameter_lists, read_not_called
from peft_sam.tuner.targets import is_target, named_parameters


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
    if not above and target_name in parameter_lists(owner):  # of the root
        return
    if above and target_name in read_not_called(owner):
        own = {f"{target_name}.{name}": parameter for name, parameter in own.items()}
        target, path, (above, _, target_name) = parent, above, above.rpartition(".")
        parent = tuner.model.get_submodule(above)
    key = base_name(path)
    reached = _reached({f"{key}.{name}": parameter for name, parameter in own.items()}, config.counts)
    layer = layer_in(target) or wrap(tuner, target, target_name, parent)
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


def adapt_inside_layers(tuner: Any, model: nn.Module, adapter_name: str, config: SamConfig) -> None:
    """Adapt the targets inside modules that an earlier adapter wrapped: PEFT does not look inside its layers."""
    reached = {id(layer.get_base_layer()) for layer in layers_with(model, adapter_name).values()}
    inside = [(path, module) for path, module in base_modules(model) if ".base_layer." in path]
    for path, module in inside:
        if id(module) not in reached and is_target(config, path):
            parent, _, child = path.rpartition(".")
            adapt(tuner, config, adapter_name, model.get_submodule(path), child, model.get_submodule(parent), path)
            tuner.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)


def wrap(tuner: Any, module: nn.Module, name: str, parent: nn.Module, targeted: bool = True) -> SamLayer:
    """Put a sparse layer around `module`, child `name` of `parent`; `targeted` as in `make_layer`."""
    layer = make_layer(module, tuner, targeted)
    replace(parent, name, layer)
    return layer


def replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in a child's place. Deltas are made on their parameter's device, so there is nothing to move."""
    # a nested target has a parent that was wrapped a moment ago
    setattr(parent.get_base_layer() if isinstance(parent, SamLayer) else parent, name, module)


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
