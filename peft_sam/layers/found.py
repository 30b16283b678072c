"""Finding the base model's modules and the sparse layers in a model, under the names of the unwrapped base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from peft_sam._peft import AuxiliaryTrainingWrapper, BaseTunerLayer
from peft_sam.layers.base import SamLayer
from peft_sam.layers.low_rank import LowRank
from peft_sam.layers.owned import read_not_called
from peft_sam.sparse.delta import SparseDelta

# What tuners, modules_to_save, and wrappers of torch (compiling, FSDP, checkpointing) put in a module's path.
WRAPPERS = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# what PEFT's model and tuner put before it
PEFT_PREFIX = "base_model.model."


def base_name(name: str) -> str:
    """The name that a module or parameter has in the unwrapped base model."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def base_modules(model: nn.Module, parts: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Names in `model` and modules of the base model, seen through tuner layers and modules_to_save; without the root.

    A child whose parameters its parent reads without calling it belongs to the parent and is left out, unless `parts`.
    """
    seen: set[int] = set()

    def below(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            here = inside = f"{path}{name}"
            if isinstance(child, AuxiliaryTrainingWrapper):
                child, here = child.original_module, f"{here}.original_module"
                inside = here
            while isinstance(child, BaseTunerLayer):
                child, inside = child.base_layer, f"{inside}.base_layer"
            if id(child) not in seen and (parts or name not in read_not_called(module)):
                seen.add(id(child))
                yield here, child
                yield from below(child, f"{inside}.")

    return below(model, "")


def layer_in(module: nn.Module) -> SamLayer | None:
    """The sparse layer that a module is, or that another tuner has wrapped."""
    while isinstance(module, BaseTunerLayer) and not isinstance(module, SamLayer):
        module = module.base_layer
    return module if isinstance(module, SamLayer) else None


def put_in_place_of(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in all the places that another has in a network."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def module_of(path: str) -> str:
    """The name in the unwrapped base model of the module at `path` in a model or a file."""
    return base_name(path).removeprefix(PEFT_PREFIX)


def sam_layers(model: nn.Module) -> dict[str, SamLayer]:
    """The sparse layers of a model by module name in the unwrapped base model, in its order.

    A module that an adapter trains densely is a copy of the base model's, with copies of its sparse layers: not those.
    """
    return {
        base_name(name).removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, SamLayer) and "modules_to_save" not in name.split(".")
    }


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, SamLayer]:
    """Those that an adapter targets."""
    return {name: layer for name, layer in sam_layers(model).items() if adapter_name in layer.sam_sparse_delta}


def deltas_of(model: nn.Module, adapter_name: str) -> dict[str, SparseDelta]:
    """All deltas of an adapter, pending ones included, by parameter name in the unwrapped base model."""
    return {
        f"{module}.{name}": delta
        for module, layer in sam_layers(model).items()
        for name, delta in layer.deltas(adapter_name).items()
    }


def pairs_of(model: nn.Module, adapter_name: str) -> dict[str, LowRank]:
    """All low-rank pairs of an adapter, by module name in the unwrapped base model."""
    found = {module: layer.pair(adapter_name) for module, layer in sam_layers(model).items()}
    return {module: pair for module, pair in found.items() if pair is not None}


def has_support(model: nn.Module, adapter_name: str) -> bool:
    """Whether any delta of the adapter has its support."""
    return any(not delta.pending for delta in deltas_of(model, adapter_name).values())


def adapted_part(model: nn.Module) -> nn.Module:
    """The module that has the adapters: the model itself, or the one part of it that has some.

    Raises:
        ValueError: if several parts have.
    """
    parts: list[nn.Module] = []
    for module in model.modules():
        adapted = isinstance(getattr(module, "peft_config", None), Mapping)
        if adapted and not any(module in part.modules() for part in parts):
            parts.append(module)
    if len(parts) > 1:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"several parts of the {type(model).__name__} have adapters ({kinds}): pass the part that is meant, a "
            "dataloader, and a loss_fn that runs the whole."
        )
    return parts[0] if parts else model
