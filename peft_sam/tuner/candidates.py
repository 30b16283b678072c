"""What an adapter can change, what of it is chosen, and giving it its support."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_sam._peft import NoMatchingPeftModuleError
from peft_sam.config import SamConfig
from peft_sam.files.checkpoint import counts_in, modules_in, read_file
from peft_sam.files.fingerprint import fingerprints
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import layers_with, sam_layers
from peft_sam.layers.low_rank import LowRank
from peft_sam.layers.owned import stored_parameters
from peft_sam.recorded import check_selection
from peft_sam.scores import SCORES
from peft_sam.selection import Selection
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.support import check_support
from peft_sam.tuner.targets import resolve_targets

# What is said of a selection and does not hold for another support.
OF_ONE_SUPPORT = ("threshold", "share", "excluded")


def trained_besides(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained besides SAM adapters, by name: a new head in `modules_to_save`."""
    kinds = (SparseDelta, LowRank)
    mine = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine}


def candidates_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The base parameters that a pending adapter can change, by name, in the base model's order."""
    return {
        f"{module}.{name}": layer.parameters_below()[name]
        for module, layer in sam_layers(model).items()
        for name in layer.deltas(adapter_name)
    }


def hidden_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[SamLayer, str]]:
    """The candidates that are quantised or offloaded: name → layer and name there."""
    found = {}
    for module, layer in sam_layers(model).items():
        own, stored = layer.parameters_below(), stored_parameters(layer.get_base_layer())
        found.update({f"{module}.{n}": (layer, n) for n in layer.deltas(adapter_name) if own[n] is not stored[n]})
    return found


def check_weights(model: nn.Module, adapter_name: str, score: str) -> None:
    """Whether the weights that a score reads can be read.

    Raises:
        ValueError: if not; names one.
    """
    if "weight" in SCORES[score].inputs and (hidden := hidden_of(model, adapter_name)):
        raise ValueError(
            f"score {score!r} reads the weights, but {next(iter(hidden))} is quantised or offloaded. Use another "
            "score, leave the module out with exclude_modules, or select on the full-precision model in memory and "
            "pass the result: select_parameters(model, selection=...)."
        )


def apply_selection(model: nn.Module, adapter_name: str, config: SamConfig, selection: Selection) -> None:
    """Give a pending adapter the support of `selection`, with deltas of zero.

    Raises:
        ValueError: if the selection was made for other candidates (names the first difference), holds what is no
            support or what no file may say of one, or the adapter is merged; nothing is changed then.
    """
    candidates = {name: parameter.shape for name, parameter in candidates_of(model, adapter_name).items()}
    for name in [*candidates, *selection.shapes]:
        here, there = candidates.get(name), selection.shapes.get(name)
        if here != there:
            raise ValueError(
                f"the selection was made for another base model or other targets: {name!r} "
                + ("is no candidate of this adapter" if here is None else f"has shape {tuple(here)} in this adapter")
                + (" and is missing from the selection." if there is None else f" and shape {tuple(there)} in it.")
            )
    layers = layers_with(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged: call model.unmerge_adapter() before selecting for it.")
    for name, shape in candidates.items():
        check_support(selection.indices[name], shape.numel(), name)
    about = selection.summary()
    check_selection(about)
    supports = {
        module: {n: found for n in layer.deltas(adapter_name) if len(found := selection.indices[f"{module}.{n}"])}
        for module, layer in layers.items()
    }
    before = {module: layer.deltas(adapter_name) for module, layer in layers.items()}
    try:
        _start(layers, adapter_name, config, supports)
        config.record(about, fingerprints(layers, adapter_name))
    except BaseException:
        for module, pending in before.items():
            layers[module].leave_support(adapter_name, pending)
        raise


def share_support(model: nn.Module, like: str, adapter_name: str, config: SamConfig) -> None:
    """Give an adapter the support of another, `like`, with deltas of zero."""
    layers = layers_with(model, like)
    supports = {module: {n: d.indices for n, d in layer.deltas(like).items()} for module, layer in layers.items()}
    _start(layers, adapter_name, config, supports)


def _start(
    layers: Mapping[str, SamLayer], adapter_name: str, config: SamConfig, supports: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Supports by module and parameter, with the deltas and low-rank pairs that training starts from."""
    for module, layer in layers.items():
        layer.set_support(adapter_name, supports[module])
        layer.reset_pair(adapter_name)
        if not config.init_weights:
            layer.reset_values(adapter_name)


def target_as(state: Mapping[str, Tensor], config: SamConfig, model: nn.Module) -> None:
    """Have a config target the modules that a state dict has deltas for, whatever it targets by itself.

    Warns, as PEFT does, if it would not have targeted one of them.
    """
    named, own = modules_in(state), copy.copy(config)
    try:
        expected = resolve_targets(own, model)
    except NoMatchingPeftModuleError:
        expected = set()
    if extra := sorted(named - expected):
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. The "
            f"state_dict contained these additional target modules: {extra}. ",
            RuntimeWarning,
            stacklevel=2,
        )
    config.target_modules = named  # type: ignore[assignment]
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def support_as(state: Mapping[str, Tensor], config: SamConfig, model: nn.Module, adapter_name: str) -> None:
    """Give an adapter that was injected for a state dict its supports, with deltas of zero."""
    layers = layers_with(model, adapter_name)
    found = read_file(state, layers, adapter_name, config.counts)
    supports = {module: {name: indices for name, (indices, _) in found.get(module, {}).items()} for module in layers}
    _start(layers, adapter_name, config, supports)
    if config.counts != counts_in(found):
        record_counts(config, layers, adapter_name)


def record_counts(
    config: SamConfig, layers: Mapping[str, SamLayer], adapter_name: str, known: Mapping[str, Any] | None = None
) -> None:
    """Write in the config what the adapter has, where that did not come with the config, besides what is `known` of
    another support."""
    deltas = {f"{module}.{n}": d for module, layer in layers.items() for n, d in layer.deltas(adapter_name).items()}
    counts = {name: len(delta.values) for name, delta in deltas.items()}
    kept = {key: value for key, value in (known or {}).items() if key not in OF_ONE_SUPPORT}
    about = {**kept, "k": sum(counts.values()), "counts": counts}
    config.record(about, fingerprints(layers, adapter_name))
