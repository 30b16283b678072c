"""What the sparse methods share: the candidates, k entries of them that are trained, and the rest at θ⁰."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.rig.method import Setup, named_head
from peft_sam import Selection
from peft_sam.sparse.coding import code_length


def candidates(model: nn.Module, setup: Setup) -> dict[str, nn.Parameter]:
    """The parameters that the candidate modules own, by name, in the model's order.

    Raises:
        ValueError: if the model lacks one of the modules, or none of them owns a parameter.
    """
    modules = dict(model.named_modules())
    if missing := [module for module in setup.candidates if module not in modules]:
        raise ValueError(f"the model has no module {missing[0]!r}: give the names of its own modules as candidates.")
    wanted = set(setup.candidates)
    found = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in wanted}
    if not found:
        raise ValueError(f"no parameter belongs to the {len(wanted)} candidate modules: name modules that own some.")
    return found


def train_only(model: nn.Module, setup: Setup, trained: Iterable[nn.Parameter]) -> None:
    """Freeze everything but the head and `trained`."""
    model.requires_grad_(False)
    for parameter in (*(parameter for _, parameter in named_head(model, setup)), *trained):
        parameter.requires_grad_(True)


def masks_of(selection: Selection, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A selection as boolean tensors, shaped and placed as `like`."""
    masks = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in like.items()}
    for name, mask in masks.items():
        mask.view(-1)[selection.indices[name].to(mask.device)] = True
    return masks


def sparse_bytes(masks: Iterable[Tensor], itemsize: int = 4) -> int:
    """Bytes of the values under the masks and of their positions, coded as in the files of `peft_sam`."""
    counts = [(int(mask.sum()), mask.numel()) for mask in masks]
    return sum(code_length(entries, numel) + itemsize * entries for entries, numel in counts if entries)


class Masked:
    """Parameters of a model of which the entries under a mask are trained and all others have their values of before.

    Parameters are found by name in the model that each call is given.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.pretrained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.masks = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in parameters.items()}

    def select(self, selection: Selection) -> None:
        """Take another mask; the parameters follow at the next `project`."""
        self.masks = masks_of(selection, self.pretrained)

    @torch.no_grad()
    def mask_gradients(self, model: nn.Module) -> None:
        """Zero the gradients outside the mask, so that an optimizer's moments stay zero there."""
        for name, mask in self.masks.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                gradient.mul_(mask)

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Put back the pretrained values outside the mask, whatever moved them: weight decay, momentum, an old mask."""
        for name, mask in self.masks.items():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.where(mask, parameter, self.pretrained[name]))
