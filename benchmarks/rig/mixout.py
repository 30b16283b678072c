"""Mixout (Lee et al. 2019, arXiv 1909.11299): full fine-tuning that forgets to have moved."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.rig.masked import candidates
from benchmarks.rig.method import Method, Setup, named_rest


class Mixed(nn.Module):
    """W' = (d ⊙ W⁰ + (1 − d) ⊙ W − q W⁰) / (1 − q), d ~ Bernoulli(q) for each entry: dropout of W − W⁰, mean W.

    Drawn anew each time the weight is read in train mode; in eval mode, and for q = 0, W itself.
    """

    def __init__(self, pretrained: Tensor, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("pretrained", pretrained.detach().clone(), persistent=False)
        self.probability, self.generator = probability, generator

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the module computes with."""
        if not self.training or self.probability == 0:
            return weight
        kept = torch.empty_like(weight).bernoulli_(1 - self.probability, generator=self.generator)
        return self.pretrained + kept * ((weight - self.pretrained) / (1 - self.probability))


class Mixout(Method):
    """Every parameter is trained; each entry of the candidates' weights is its pretrained one with a probability.

    As in the authors' code, biases and vectors of norms are trained without it. Other than there, each entry of a
    matrix is drawn by itself (there, one draw holds for a column), and the model's dropout stays as it is, so that
    probability 0 is plain fine-tuning.

    Args:
        probability: q, of an entry to be the pretrained one at a step (p in the paper); 0 ≤ q < 1.
    """

    name: ClassVar[str] = "mixout"

    def __init__(self, probability: float = 0.9) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"probability must be in [0, 1), so that something is trained; got {probability!r}.")
        self.probability = probability

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Put the mixture between each candidate's weight and the module that reads it."""
        model.requires_grad_(True)
        generator: torch.Generator | None = None
        for name, parameter in candidates(model, setup).items():
            if parameter.ndim > 1:
                generator = generator or torch.Generator(parameter.device).manual_seed(setup.seed)
                module, _, attribute = name.rpartition(".")
                mixed = Mixed(parameter, self.probability, generator)
                parametrize.register_parametrization(model.get_submodule(module), attribute, mixed)
        return model.train(model.training)  # the new modules too

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """All of the model but the head."""
        return sum(parameter.numel() for _, parameter in named_rest(model, setup))

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """A whole model."""
        return sum(parameter.numel() * parameter.element_size() for _, parameter in named_rest(model, setup))
