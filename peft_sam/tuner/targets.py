"""Which modules a config targets, under the names of the unwrapped base model."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import (
    BaseTunerLayer,
    ExcludedModule,
    NoMatchingPeftModuleError,
    check_target_module_exists,
)
from peft_sam.config import SamConfig
from peft_sam.layers.found import base_modules, base_name, layers_with
from peft_sam.layers.owned import is_packed_linear, own_parameters, parameter_lists
from peft_sam.tuner.embeddings import modules_of_tokens

# How much of a name must be there for another to be a misspelt one: "k_proj" for "q_proj" is not.
ALIKE = 0.88


def is_target(config: SamConfig, path: str) -> Any:
    """Whether a config targets the module at `path` in a model: PEFT's answer, an `ExcludedModule` for "taken out".

    What another adapter trains densely is no module of the base model, and a tuner layer stands for what it wraps.
    """
    parts = path.split(".")
    if "modules_to_save" in parts or parts[-1] == "base_layer":
        return False
    name = base_name(path)
    return ExcludedModule() if _is_dense(config, name) else check_target_module_exists(config, name)


def _is_dense(config: SamConfig, name: str) -> bool:
    # PEFT trains densely whatever ends in one of these names: "classifier" takes DistilBERT's pre_classifier, too
    dense = tuple(config.modules_to_save or ())
    return any(".".join(name.split(".")[:end]).endswith(dense) for end in range(1, name.count(".") + 2))


def resolve_targets(config: SamConfig, model: nn.Module) -> set[str]:
    """Turn None and "all" in `config.target_modules` into names, and check that the targets exist and can change.

    Modules of which PEFT trains single rows (`trainable_token_indices`) are left alone.

    Returns:
        the names of the targets in the unwrapped base model.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) if nothing matches, in PEFT's words; lists what could be targeted.
        ValueError: if a target has a parameter that is not floating point, or is one whose rows are trained.
    """
    of_the_root = parameter_lists(model)  # nothing of the root's is a candidate
    modules = {path: module for path, module in base_modules(model, parts=True) if path not in of_the_root}
    wanted, by_rows = config.target_modules, modules_of_tokens(config, model)
    if wanted is None or wanted in ("all", "all-linear"):
        chosen = _all_linear(modules, model, keep_head=wanted is not None) if wanted != "all" else list(modules)
        names = {base_name(name) for name in chosen if own_parameters(modules[name])} - by_rows
        config.target_modules = {name for name in names if _in_layers(config, name)}  # type: ignore[assignment]
    answers = {name: is_target(config, name) for name in modules}
    owners = [name for name, answer in answers.items() if answer and own_parameters(modules[name])]
    parameters = named_parameters(config, modules)
    if not owners and not parameters:
        raise NoMatchingPeftModuleError(f"{_why_none(config, wanted, answers.values())} {_what_could_be(modules)}")
    if not isinstance(wanted, str) and wanted is not None:
        _warn_of_typos(wanted, modules)
    for name in dict.fromkeys([*owners, *parameters]):
        if base_name(name) in by_rows:
            raise ValueError(
                f"{base_name(name)!r} is a target and in trainable_token_indices, too: take it out of one of them."
            )
        own = own_parameters(modules[name])
        for parameter_name in own if name in owners else parameters[name]:
            parameter = own[parameter_name]
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {base_name(name)}.{parameter_name} is {parameter.dtype} and cannot take a delta: "
                    "only linear layers may be quantised. Load the base model without quantisation, or leave the "
                    f"module out with exclude_modules. {_what_could_be(modules)}"
                )
    return {base_name(name) for name in owners}


def named_parameters(config: SamConfig, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The modules that own parameters which `target_parameters` names, with the names in the module.

    Modules that are trained densely are left alone.

    Args:
        modules: of the base model by their paths in the model (`base_modules`).
    """
    wanted, found = tuple(config.target_parameters or ()), defaultdict(list)
    endings = tuple(f".{name}" for name in wanted)
    for path, module in modules.items() if wanted else ():
        for name in own_parameters(module) if not _is_dense(config, base_name(path)) else ():
            full = f"{base_name(path)}.{name}"
            if full in wanted or full.endswith(endings):
                found[path].append(name)
    return dict(found)


def shapes_of_candidates(model: nn.Module, adapter_name: str, config: SamConfig) -> dict[str, torch.Size]:
    """The parameters that an adapter could be given entries of, selected or not, by name in the base model."""
    found = {}
    for module, layer in layers_with(model, adapter_name).items():
        wanted = named_parameters(config, {module: layer.get_base_layer()}).get(module, [])
        known = {*wanted, *layer.deltas(adapter_name)}
        for name, parameter in layer.parameters_below().items():
            if not layer.follows(name) and (name in known or is_target(config, module)):
                found[f"{module}.{name}"] = parameter.shape
    return found


def _all_linear(modules: dict[str, nn.Module], model: nn.Module, keep_head: bool) -> list[str]:
    """Linear layers but the output embedding; without `keep_head` also without what lies outside `base_model`."""
    model = getattr(model, "_orig_mod", model)  # compiled
    names = [name for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D)) or is_packed_linear(m)]
    if not isinstance(model, PreTrainedModel):
        return names
    output = model.get_output_embeddings()
    output = output.get_base_layer() if isinstance(output, BaseTunerLayer) else output
    names = [name for name in names if modules[name] is not output]
    body = model.base_model
    if keep_head or body is model:
        return names
    inside = {id(module) for module in body.modules()}
    return [name for name in names if id(modules[name]) in inside]


def _in_layers(config: SamConfig, name: str) -> bool:
    if config.layers_to_transform is None:
        return True
    if "." not in name:
        return False
    # PEFT applies layers_to_transform to name endings only, not to full names
    probe = copy.copy(config)
    probe.target_modules = {name.rpartition(".")[2]}  # type: ignore[assignment]
    return bool(is_target(probe, name))


def _why_none(config: SamConfig, wanted: Any, answers: Collection[Any]) -> str:
    """PEFT's words, which people search for."""
    excluded = [isinstance(answer, ExcludedModule) for answer in answers]
    if excluded and all(excluded):
        return (
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` and "
            "`modules_to_save` configuration."
        )
    if not any(excluded) and not any(answers) and not wanted:
        what = "No `target_modules` passed but also no `target_parameters` found. Please check these arguments."
        default = " The default are linear layers, and none is left: name modules, or pass target_modules='all'."
        return what if wanted is not None else what + default
    if not any(excluded) and not any(answers):
        what = f"Target modules {wanted} not found in the base model. Please check the target modules and try again."
    else:
        what = (
            "No modules were targeted for adaptation. This might be caused by a combination of "
            f"target_modules={wanted!r}, exclude_modules={config.exclude_modules!r} and "
            f"modules_to_save={config.modules_to_save!r}, which leaves no module that owns parameters."
        )
    where = {name: getattr(config, name) for name in ("layers_to_transform", "layers_pattern")}
    notes = [f"{name}={value!r}" for name, value in where.items() if value is not None]
    return f"{what} Note: you specified {' and '.join(notes)}." if notes else what


def _warn_of_typos(wanted: Collection[str], modules: Mapping[str, nn.Module]) -> None:
    """Warn of names that match nothing and look like one that would: lists of many models' names are common."""
    endings = {name for key in map(base_name, modules) for name in _endings(key)}
    found = {}
    for name in sorted(set(wanted) - endings):
        alike = sorted(end for end in endings - set(wanted) if end.count(".") == name.count("."))
        if close := difflib.get_close_matches(name, alike, cutoff=ALIKE):
            found[name] = close
    if found:
        names = "; ".join(f"{name!r}, did you mean {' or '.join(map(repr, close))}?" for name, close in found.items())
        warnings.warn(f"Target modules not found in the base model, while others are: {names}", stacklevel=2)


def _endings(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _what_could_be(modules: dict[str, nn.Module]) -> str:
    kinds: dict[str, set[str]] = defaultdict(set)
    for name, module in modules.items():
        own = own_parameters(module).values()
        if own and all(parameter.is_floating_point() for parameter in own):
            kinds[type(module).__name__].add(name.rpartition(".")[2])
    listed = "; ".join(f"{kind}: {', '.join(sorted(names)[:12])}" for kind, names in sorted(kinds.items()))
    return f"Modules that could be targeted: {listed or 'none'}."
