"""What `load_state_dict` does with sparse adapters: supports of other sizes take the place of those that are there.

So a pending adapter takes what a checkpoint holds: by torch, by Accelerate's `load_state`, by sentence-transformers'
resuming. Checkpoints of versions whose state dicts had the positions (`….indices`) are read, too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_sam.files.checkpoint import counts_in, read_file
from peft_sam.layers.base import SamLayer
from peft_sam.layers.deltas import name_of
from peft_sam.layers.found import has_support, layers_with, module_of
from peft_sam.tuner.candidates import record_counts

# Under this attribute a model keeps the handle of the hook that it gets.
KEPT = "_sam_sparse_states"
KEY = re.compile(r"^(?P<path>.*)\.sam_sparse_delta\.(?P<adapter>[^.]+)\.(?P<parameter>[^.]+)\.(?P<part>[^.]+)$")


class Part(NamedTuple):
    """What a key of a state dict tells: a tensor of the delta of one parameter."""

    module: str
    parameter: str
    part: str


def take_states(model: nn.Module) -> None:
    """Have `load_state_dict` of a model, or of what it is a part of, make room for the supports that come."""
    if KEPT not in model.__dict__:
        model.__dict__[KEPT] = model.register_load_state_dict_pre_hook(_make_room)


def leave_states(model: nn.Module) -> None:
    """Undo that."""
    if KEPT in model.__dict__:
        model.__dict__.pop(KEPT).remove()


def _make_room(model: Any, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Before torch fills in the tensors: give adapters whose supports have other sizes in `state` those supports.

    Raises:
        ValueError: if they are damaged or do not fit the model; nothing is changed then.
    """
    for adapter_name, keys in _by_adapter(state, prefix).items():
        layers = layers_with(model, adapter_name)
        again = _other_names(model) - layers.keys()
        keys = {part: key for part, key in keys.items() if part.module not in again}
        if not layers or _fits({part: state[key].shape for part, key in keys.items()}, layers, adapter_name):
            continue
        if not any(len(state[key]) for part, key in keys.items() if part.part == "values"):
            raise ValueError(
                f"the state dict is of a model whose adapter {adapter_name!r} was pending: it holds no parameters that "
                "this one, whose parameters are selected, could take."
            )
        named = {
            f"{part.module}.sam_sparse_delta.{part.parameter}.{part.part}": state[key] for part, key in keys.items()
        }
        found, pending = read_file(named, layers, adapter_name, None), not has_support(model, adapter_name)
        bases = _bases_in(state, prefix) & layers.keys()
        for module, layer in layers.items():
            if bases and not pending and module not in bases | found.keys():
                continue  # a part of a model's state; deltas alone are a whole adapter's
            of = found.get(module, {})
            layer.set_support(adapter_name, {n: i for n, (i, _) in of.items()}, {n: v for n, (_, v) in of.items()})
        for part, key in keys.items():
            if part.part == "indices":
                delta = layers[part.module].deltas(adapter_name)[name_of(part.parameter)]
                state[key.removesuffix("indices") + "support"] = delta.support
                del state[key]
        config = model.peft_config[adapter_name]
        if config.counts != counts_in(found):
            record_counts(config, layers, adapter_name, {} if pending else config.selection)


def _bases_in(state: Mapping[str, Tensor], prefix: str) -> set[str]:
    """The modules of which a state dict has parameters of the base."""
    keys = (key.removeprefix(prefix) for key in state if ".sam_sparse_" not in key)
    return {module_of(key.rpartition(".")[0]) for key in keys}


def _other_names(model: nn.Module) -> set[str]:
    """All names of the sparse layers: a module that several share has several."""
    every = model.named_modules(remove_duplicate=False)
    return {module_of(name) for name, module in every if isinstance(module, SamLayer)}


def _by_adapter(state: Mapping[str, Tensor], prefix: str) -> dict[str, dict[Part, str]]:
    """Adapter name → what a key tells → the key, of the sparse deltas in a state dict."""
    found: dict[str, dict[Part, str]] = defaultdict(dict)
    for key in state:
        match = KEY.match(key.removeprefix(prefix)) if ".sam_sparse_delta." in key else None
        if match and "modules_to_save" not in match["path"].split("."):
            found[match["adapter"]][Part(module_of(match["path"]), match["parameter"], match["part"])] = key
    return found


def _fits(shapes: Mapping[Part, tuple[int, ...]], layers: Mapping[str, SamLayer], adapter_name: str) -> bool:
    """Whether torch can fill in these tensors: there are such."""
    here = {
        Part(module_of(module), key, part): tensor.shape
        for module, layer in layers.items()
        for key, delta in layer.sam_sparse_delta[adapter_name].named_children()
        for part, tensor in delta.state_dict().items()
    }
    return all(here.get(part) == shape for part, shape in shapes.items())
