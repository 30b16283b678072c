"""Parameters that several modules own (a word embedding that is also the output layer) and their one delta.

And modules that a network has in several places, with their one layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from peft_sam.config import SamConfig
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import base_modules, base_name, layer_in, pairs_of, put_in_place_of, sam_layers
from peft_sam.layers.owned import stored_parameters
from peft_sam.tuner.adapting import wrap


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
    """Take the layers off modules with these names, or endings of names, that no adapter targets: `tie` is next.

    PEFT puts no copy that is trained densely in the place of a tuner's layer.
    """
    for path, layer in list(sam_layers(model).items()):
        targeted = any(layer.deltas(adapter_name) for adapter_name in layer.sam_sparse_delta)
        if not targeted and any(path == name or path.endswith(f".{name}") for name in names):
            take_off(model, layer)


def take_off(model: nn.Module, layer: SamLayer) -> None:
    """Put its module back in the place of a layer that no adapter reaches."""
    for owner in {id(owner): owner for owner, _ in layer._tied.values()}.values():
        owner._followers.remove(layer)
    for follower in layer._followers:
        follower._tied = {name: place for name, place in follower._tied.items() if place[0] is not layer}
    put_in_place_of(model, layer, layer.base_layer)


def tie(tuner: Any, model: nn.Module) -> None:
    """Give each shared parameter that an adapter targets anywhere one delta, in the first place; others follow it."""

    def layer_at(name: str) -> SamLayer:
        module = model.get_submodule(name)
        if (found := layer_in(module)) is not None:
            return found
        path, _, child = name.rpartition(".")
        layer = wrap(tuner, module, child, model.get_submodule(path), targeted=False)
        layer.set_adapter(tuner.active_adapters)
        return layer

    for adapter_name, config in tuner.peft_config.items():
        if isinstance(config, SamConfig):
            _tie_one(model, adapter_name, layer_at, config.counts or {})


def _tie_one(
    model: nn.Module, adapter_name: str, layer_at: Callable[[str], SamLayer], counts: Mapping[str, int]
) -> None:
    """The same for one adapter.

    Args:
        layer_at: name of a module → its sparse layer, made if there is none.
        counts: entries by parameter name, where a file announces them.
    """

    def has_delta(place: Place) -> bool:
        layer = layer_in(model.get_submodule(place.module))
        return layer is not None and place.parameter in layer.deltas(adapter_name)

    for first, *others in shared_parameters(model):
        targeted = [place for place in (first, *others) if has_delta(place)]
        if not targeted and first.base_name not in counts:
            continue
        owner = layer_at(first.module)
        if first not in targeted:
            owner.update_layer(adapter_name, [first.parameter])
        for place in others:
            layer = layer_at(place.module)
            layer.tie(place.parameter, owner, first.parameter)
            if place in targeted:
                layer.drop(adapter_name, place.parameter)


def drop_shared_pairs(model: nn.Module, adapter_name: str) -> None:
    """Take away the low-rank pairs of weights that several modules own, whether a delta of them is tied or not."""
    weights = [place for places in shared_parameters(model) for place in places if place.parameter == "weight"]
    shared = {base_name(place.module) for place in weights}
    for module in pairs_of(model, adapter_name).keys() & shared:
        sam_layers(model)[module].drop_pair(adapter_name)


def share(model: nn.Module) -> None:
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
