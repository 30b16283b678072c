"""How the tensors of a model lie in a checkpoint: transformers renames, fuses and splits them on the way."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from peft_sam.export.base_files import name_in_files

# the numbered layer that a parameter belongs to
LAYER = re.compile(r"^.*?\.\d+\.")

State = Mapping[str, Tensor]


class Place(NamedTuple):
    """A tensor of the checkpoint: its name, shape and dtype there."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


class Checkpoint:
    """The checkpoint that a model was loaded from, or would save.

    Attributes:
        state: the model's floating-point tensors, by name in the model; tied ones under each name.
        names: those that the checkpoint holds: tied ones once, but as often as `there` has them.
        places: the checkpoint's tensors, by the name that the model would save them under.

    Args:
        model: a plain model.
        there: names in the checkpoint's files, as far as known. Where they differ from the model's by the prefix of a
            headless model, they are the ones that count.
    """

    def __init__(self, model: nn.Module, there: Set[str]) -> None:
        self.model = model
        self.state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        prefix = getattr(model, "base_model_prefix", "")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = self._saved_once(parameters)
        others = [name for name in parameters if name in self.state and name not in names]
        self.names = names + [name for name in others if name_in_files(name, there, prefix) in there]
        whole = self._meta(self.names)
        self.places = {n: Place(name_in_files(n, there, prefix), t.shape, t.dtype) for n, t in whole.items()}
        self._layers = self._by_layer()

    def numel(self) -> int:
        """Entries of all its tensors."""
        return sum(place.shape.numel() for place in self.places.values())

    @torch.no_grad()
    def placed(self, marks: Mapping[str, Callable[[], Tensor]]) -> Iterator[tuple[Place, Tensor]]:
        """Integers at entries of the model, carried to where these entries lie in the checkpoint.

        The way is that of `save_pretrained`, one layer of the model at a time.

        Args:
            marks: name in the model → integers of the tensor's shape, made when needed; the others have zeros.

        Yields:
            The tensors of the checkpoint that such a layer makes, as integers.
        """
        for group in self._layers:
            if marks.keys().isdisjoint(group):
                continue
            found = {name: marks[name]() for name in group if name in marks}
            none = next(iter(found.values())).new_zeros(())
            for name in group:
                if name not in found:
                    found[name] = none.to(self.state[name].device).expand(self.state[name].shape)
            for name, tensor in self._revert({name: found[name] for name in group}).items():
                yield self.places[name], tensor

    def makers(self, wanted: Set[str]) -> list[str]:
        """The tensors of the model in the layers that make those tensors of the checkpoint."""
        found = []
        for group in self._layers:
            if any(self.places[name].name in wanted for name in self._meta(group)):
                found += group
        return found

    def _saved_once(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        if isinstance(self.model, PreTrainedModel):
            ignored = set(self.model._keys_to_ignore_on_save or ())
            kept = {name: tensor for name, tensor in self.state.items() if name not in ignored}
            return list(remove_tied_weights_from_state_dict(kept, self.model))
        first: dict[int, str] = {}
        for name, tensor in self.state.items():
            first.setdefault(id(parameters.get(name, tensor)), name)
        return list(first.values())

    def _by_layer(self) -> list[list[str]]:
        """The names by layer, or all together where some tensor of the checkpoint is made from several layers."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            match = LAYER.match(name)
            groups[match[0] if match else ""].append(name)
        apart = {name: tensor.shape for group in groups.values() for name, tensor in self._meta(group).items()}
        same = apart == {name: place.shape for name, place in self.places.items()}
        return list(groups.values()) if same else [self.names]

    def _meta(self, names: list[str]) -> State:
        return self._revert({name: self.state[name].to("meta") for name in names})

    def _revert(self, state: dict[str, Tensor]) -> State:
        if isinstance(self.model, PreTrainedModel):
            found: State = revert_weight_conversion(self.model, state)
            return found
        return state
