"""Child-Tuning_D (Xu et al. 2021, arXiv 2109.05687) and ChildPruning: a mask by Fisher information."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.rig.masked import Masked, candidates, sparse_bytes, train_only
from benchmarks.rig.method import Method, Setup
from peft_sam import accumulate, choose
from peft_sam.selecting.batches import from_loader


class ChildTuning(Method):
    """The ⌊p·m⌋ candidates with the largest Fisher information are trained; gradients elsewhere are masked.

    The Fisher information of an entry is the mean over batches of the square of the batch's gradient, in train mode,
    as in the authors' code; a batch counts by its size. Gradients are masked before the optimizer sees them, so its
    moments are zero outside the mask, and entries there have their pretrained values after every step.

    With `every`, the ChildPruning of Fu et al. 2022: every so many steps the mask is chosen anew, by the mean squares
    of the unmasked gradients since it was chosen last, and the model is projected to it: entries that leave the mask
    get their pretrained values back, entries that join it start from there. The model has at most k changed entries
    at all times.

    Args:
        every: steps between two choices of the mask; None to choose once, before training.
    """

    name: ClassVar[str] = "childtuning"

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be None or at least 1 step; got {every!r}.")
        self.every = every

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Choose the mask by one pass over the batches."""
        parameters = candidates(model, setup)
        train_only(model, setup, parameters.values())
        self.density, self.steps, self.masked = setup.density, setup.steps, Masked(parameters)
        self.squares = {} if self.every is None else {name: torch.zeros_like(p) for name, p in parameters.items()}
        with from_loader(model, setup.batches, None, None, None) as (batches, loss):
            found = accumulate(
                model, parameters, batches, loss, statistics=("squared_gradient",), train_mode=True, progress=False
            )
        self._select(model, found.tensors["squared_gradient"])
        return model

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: int) -> None:
        """Look at the gradients, then mask them."""
        for name, square in self.squares.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                square.addcmul_(gradient, gradient)
        self.masked.mask_gradients(model)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Choose anew if it is time, but not after the last step, where no training follows; project."""
        if self.every is not None and (step + 1) % self.every == 0 and step + 1 < self.steps:
            self._select(model, self.squares)
            for square in self.squares.values():
                square.zero_()
        self.masked.project(model)

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """⌊p·m⌋."""
        return sum(int(mask.sum()) for mask in self.masked.masks.values())

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """The entries under the mask, and the mask."""
        return sparse_bytes(self.masked.masks.values())

    def _select(self, model: nn.Module, squares: dict[str, Tensor]) -> None:
        parameters = {name: model.get_parameter(name) for name in self.masked.pretrained}
        statistics = {"squared_gradient": squares}
        self.masked.select(choose(parameters, score="fisher", density=self.density, statistics=statistics))
