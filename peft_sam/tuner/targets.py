"""Which modules a config targets, under the names of the unwrapped base model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import (
    BaseTunerLayer,
    NoMatchingPeftModuleError,
    check_target_module_exists,
)
from peft_sam.config import SamConfig
from peft_sam.layers.found import base_modules, base_name
from peft_sam.layers.owned import is_packed_linear, own_parameters


def is_target(config: SamConfig, path: str) -> Any:
    """Whether a config targets the module at `path` in a model: PEFT's answer, which also tells what is excluded.

    What another adapter trains densely is no module of the base model, and a tuner layer stands for what it wraps.
    """
    parts = path.split(".")
    if "modules_to_save" in parts or parts[-1] == "base_layer":
        return False
    name = base_name(path)
    # PEFT trains densely whatever ends in one of these names: "classifier" takes DistilBERT's pre_classifier, too
    dense = tuple(config.modules_to_save or ())
    if any(".".join(name.split(".")[:end]).endswith(dense) for end in range(1, name.count(".") + 2)):
        return False
    return check_target_module_exists(config, name)


def resolve_targets(config: SamConfig, model: nn.Module) -> set[str]:
    """Turn None and "all" in `config.target_modules` into names, and check that the targets exist and can change.

    Returns:
        the names of the targets in the unwrapped base model.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) if a name matches no module, or nothing matches; lists what could
            be targeted.
        ValueError: if a target has a parameter that is not floating point.
    """
    modules = dict(base_modules(model))
    wanted = config.target_modules
    if wanted is None or wanted in ("all", "all-linear"):
        chosen = _all_linear(modules, model, keep_head=wanted is not None) if wanted != "all" else list(modules)
        names = {base_name(name) for name in chosen if own_parameters(modules[name])}
        config.target_modules = {name for name in names if _in_layers(config, name)}  # type: ignore[assignment]
    elif not isinstance(wanted, str):
        _check_names(wanted, modules)
    matched = [name for name in modules if is_target(config, name)]
    owners = [name for name in matched if own_parameters(modules[name])]
    if not owners:
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation. This might be caused by a combination of "
            f"target_modules={wanted!r}, exclude_modules={config.exclude_modules!r} and "
            f"modules_to_save={config.modules_to_save!r}, which leaves no module that owns parameters. "
            f"{_what_could_be(modules)}"
        )
    for name in owners:
        for parameter_name, parameter in own_parameters(modules[name]).items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {base_name(name)}.{parameter_name} is {parameter.dtype} and cannot take a delta: "
                    "only linear layers may be quantised. Load the base model without quantisation, or leave the "
                    f"module out with exclude_modules. {_what_could_be(modules)}"
                )
    return {base_name(name) for name in owners}


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


def _check_names(wanted: set[str] | list[str], modules: dict[str, nn.Module]) -> None:
    endings = {name for key in map(base_name, modules) for name in _endings(key)}
    missing = sorted(name for name in wanted if name not in endings)
    if missing:
        raise NoMatchingPeftModuleError(
            f"Target modules {missing} not found in the base model. {_what_could_be(modules)}"
        )


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
