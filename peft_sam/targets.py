"""Which modules a config targets, under the names of the unwrapped base model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import BaseTunerLayer, NoMatchingPeftModuleError, check_target_module_exists
from peft_sam.config import SamConfig
from peft_sam.owned import READ_NOT_CALLED, is_packed_linear, own_parameters


def base_name(name: str) -> str:
    """The name that a module or parameter has in the unwrapped base model."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names in `model` and modules of the base model, seen through tuner layers; without the root.

    A child whose parameters its parent reads without calling it belongs to the parent and is left out.
    """
    seen: set[int] = set()

    def below(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            here = inside = f"{path}{name}"
            while isinstance(child, BaseTunerLayer):
                child, inside = child.base_layer, f"{inside}.base_layer"
            if id(child) not in seen and name not in READ_NOT_CALLED.get(type(module), ()):
                seen.add(id(child))
                yield here, child
                yield from below(child, f"{inside}.")

    return below(model, "")


def resolve_targets(config: SamConfig, model: nn.Module) -> None:
    """Turn None and "all" in `config.target_modules` into names, and check that the targets exist and can change.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) if a name matches no module, or nothing matches; lists what could
            be targeted.
        ValueError: if a target has a parameter that is not floating point.
    """
    modules = dict(base_modules(model))
    wanted = config.target_modules
    if wanted is None or wanted in ("all", "all-linear"):
        chosen = _all_linear(modules, model, keep_head=wanted is not None) if wanted != "all" else list(modules)
        names = {name for name in chosen if own_parameters(modules[name])}
        names = {name for name in names if _in_layers(config, name)}
        config.target_modules = names  # type: ignore[assignment]
        matched = [name for name in names if check_target_module_exists(config, name)]
    else:
        matched = [name for name in modules if check_target_module_exists(config, base_name(name))]
        if not isinstance(wanted, str):
            _check_names(wanted, modules)
    owners = [name for name in matched if own_parameters(modules[name])]
    if not owners:
        raise NoMatchingPeftModuleError(
            f"target_modules={wanted!r} matches no module that owns parameters. {_what_could_be(modules)}"
        )
    for name in owners:
        for parameter_name, parameter in own_parameters(modules[name]).items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {base_name(name)}.{parameter_name} is {parameter.dtype} and cannot take a delta: "
                    "only linear layers may be quantised. Load the base model without quantisation, or leave the "
                    f"module out with exclude_modules. {_what_could_be(modules)}"
                )


def _all_linear(modules: dict[str, nn.Module], model: nn.Module, keep_head: bool) -> list[str]:
    """Linear layers but the output embedding; without `keep_head` also without what lies outside `base_model`."""
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
    return bool(check_target_module_exists(probe, name))


def _check_names(wanted: set[str] | list[str], modules: dict[str, nn.Module]) -> None:
    endings = {name for key in map(base_name, modules) for name in _endings(key)}
    missing = sorted(name for name in wanted if name not in endings)
    if missing:
        raise NoMatchingPeftModuleError(
            f"target_modules names {missing}, which match no module of the model. {_what_could_be(modules)}"
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
