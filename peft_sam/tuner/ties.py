"""Parameters that several modules own (a word embedding that is also the output layer) and their one delta."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from peft_sam.config import SamConfig
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import base_modules, base_name, put_in_place_of, sam_layers
from peft_sam.layers.owned import stored_parameters


class Place(NamedTuple):
    """A module and the name of one of its parameters."""

    module: str
    parameter: str

    @property
    def base_name(self) -> str:
        """The parameter's full name at this place, in the unwrapped base model."""
        return f"{base_name(self.module)}.{self.parameter}"


def shared_parameters(model: nn.Module) -> list[list[Place]]:
    """The places of each parameter that has several; the first gives the parameter its name."""
    places: dict[int, list[Place]] = defaultdict(list)
    for name, module in base_modules(model):
        for parameter_name, parameter in stored_parameters(module).items():
            places[id(parameter)].append(Place(name, parameter_name))
    return [found for found in places.values() if len(found) > 1]


def loosen(model: nn.Module, names: Collection[str]) -> None:
    """Take the layers off modules with these names, or endings of names, that do no more than follow: `tie` is next.

    PEFT puts no copy that is trained densely in the place of a tuner's layer.
    """
    for path, layer in list(sam_layers(model).items()):
        follows = layer._tied and not any(layer.deltas(adapter_name) for adapter_name in layer.sam_sparse_delta)
        if follows and any(path == name or path.endswith(f".{name}") for name in names):
            for owner, _ in layer._tied.values():
                owner._followers.remove(layer)
            put_in_place_of(model, layer, layer.base_layer)


def tie(model: nn.Module, adapter_name: str, wrap: Callable[[str], SamLayer], config: SamConfig) -> None:
    """Give each shared parameter that is targeted anywhere one delta, in the first place; the others follow it.

    Args:
        wrap: name of a module → its sparse layer, made if there is none.
    """
    counts = config.counts or {}

    def has_delta(place: Place) -> bool:
        layer = model.get_submodule(place.module)
        return isinstance(layer, SamLayer) and place.parameter in layer.deltas(adapter_name)

    for first, *others in shared_parameters(model):
        targeted = [place for place in (first, *others) if has_delta(place)]
        if not targeted and first.base_name not in counts:
            continue
        owner = wrap(first.module)
        if first not in targeted:
            owner.update_layer(adapter_name, [first.parameter])
        for place in others:
            layer = wrap(place.module)
            layer.tie(place.parameter, owner, first.parameter)
            if place in targeted:
                layer.drop(adapter_name, place.parameter)
