"""Diff pruning (Guo et al. 2021, arXiv 2012.07463): a sparse difference learnt by gates with an L0 penalty."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.rig.method import Method, Setup, named_head
from peft_sam import choose
from peft_sam.sparse.coding import code_length

# the uniform noise of a gate keeps away from 0 and 1, where its logit is infinite (the authors' bounds)
NOISE = (1e-4, 1 - 1e-4)


def hard_concrete(log_alpha: Tensor, noise: Tensor, lower: float, upper: float) -> Tensor:
    """z = min(1, max(0, l + (r − l) σ(logit u + log α))), a differentiable draw of a gate from uniform noise u.

    The hard concrete distribution of Louizos et al. 2018 (arXiv 1712.01312) at temperature β = 1, as the authors have.
    """
    return (torch.sigmoid(torch.logit(noise) + log_alpha) * (upper - lower) + lower).clamp(0, 1)


def likely_gate(log_alpha: Tensor, lower: float, upper: float) -> Tensor:
    """The gate without noise, at u = ½, for use outside of training."""
    return (torch.sigmoid(log_alpha) * (upper - lower) + lower).clamp(0, 1)


def open_probability(log_alpha: Tensor, lower: float, upper: float) -> Tensor:
    """P(z ≠ 0) = σ(log α − log(−l / r)); its sum is the expected L0 norm of the gates."""
    return torch.sigmoid(log_alpha - math.log(-lower / upper))


class Gated(nn.Module):
    """θ = θ⁰ + z ⊙ w, θ⁰ frozen, with gates z that are drawn in train mode; once they are `fixed`, θ = θ⁰ + m ⊙ w."""

    def __init__(self, pretrained: Tensor, log_alpha: float, stretch: tuple[float, float], generator: Any) -> None:
        super().__init__()
        self.stretch, self.generator, self.fixed = stretch, generator, False
        self.difference = nn.Parameter(torch.zeros_like(pretrained))
        self.log_alpha = nn.Parameter(torch.full_like(pretrained, log_alpha))
        self.register_buffer("mask", torch.ones_like(pretrained, dtype=torch.bool))

    def delta(self) -> Tensor:
        """θ − θ⁰ as the module in its present mode has it."""
        if self.fixed:
            return self.mask * self.difference
        if not self.training:
            return likely_gate(self.log_alpha, *self.stretch) * self.difference
        noise = torch.empty_like(self.log_alpha).uniform_(*NOISE, generator=self.generator)
        return hard_concrete(self.log_alpha, noise, *self.stretch) * self.difference

    def forward(self, pretrained: Tensor) -> Tensor:
        """The weight that the module computes with."""
        return pretrained + self.delta()

    @torch.no_grad()
    def project(self, mask: Tensor, fix: bool) -> None:
        """Leave nothing outside the mask: for good, the gates ended, if `fix`; else to grow again."""
        if fix:
            self.difference.mul_(likely_gate(self.log_alpha, *self.stretch))
            self.mask.copy_(mask)
            self.log_alpha.requires_grad_(False)
            self.log_alpha.grad = None
            self.fixed = True
        self.difference.mul_(mask)


class DiffPruning(Method):
    """δ = z ⊙ w for all candidates with a penalty on P(z ≠ 0); then the ⌊p·m⌋ largest |δ|, trained on.

    For the first `burn_in` of the steps the gates and w are trained together. Then the k largest |δ| of all candidates
    are kept (the authors' magnitude pruning) and w goes on with this mask. The authors give both parts equal steps;
    their structured variant, with a gate for each matrix besides, is left out.

    Attributes:
        burn_in: share of the steps before the mask is fixed; 1 fixes it at the end only.
        project_every: project δ to its k largest entries every so many steps of the burn-in, and go on with all. With
            burn_in=1 and 600 this is what Figure 3 of Fu et al. 2022 shows; None for no such steps.
        weight: λ of the penalty λ Σ P(z ≠ 0) over all candidate entries; this and the rest are the authors' values.
        gate_lr, log_alpha, stretch: learning rate of log α, where it starts, and l < 0 and r > 1 of the gates.
    """

    name: ClassVar[str] = "diffpruning"
    weight: ClassVar[float] = 1.25e-7
    gate_lr: ClassVar[float] = 0.1
    log_alpha: ClassVar[float] = 5.0
    stretch: ClassVar[tuple[float, float]] = (-1.5, 1.5)

    def __init__(self, burn_in: float = 0.5, project_every: int | None = None) -> None:
        if not 0 < burn_in <= 1:
            raise ValueError(f"burn_in is a share of the steps, 0 < burn_in <= 1; got {burn_in!r}.")
        if project_every is not None and project_every < 1:
            raise ValueError(f"project_every must be None or at least 1 step; got {project_every!r}.")
        self.burn_in, self.project_every = burn_in, project_every

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Freeze θ⁰ and add w = 0 and the gates to every candidate."""
        parameters = candidates(model, setup)
        generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(setup.seed)
        model.requires_grad_(False)
        for _, parameter in named_head(model, setup):
            parameter.requires_grad_(True)
        for name, parameter in parameters.items():
            module, _, attribute = name.rpartition(".")
            gated = Gated(parameter, self.log_alpha, self.stretch, generator)
            parametrize.register_parametrization(model.get_submodule(module), attribute, gated)
        self.density, self.last_of_burn_in = setup.density, math.ceil(self.burn_in * setup.steps) - 1
        return model.train(model.training)  # the new modules too

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The head and w at `lr`, the gates at their own rate."""
        gates = [gated.log_alpha for gated in _gated(model).values()]
        apart = {id(gate) for gate in gates}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        return [{"params": others, "lr": lr}, {"params": gates, "lr": self.gate_lr, "weight_decay": 0.0}]

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        """λ Σ P(z ≠ 0) while there are gates."""
        found = [gated for gated in _gated(model).values() if not gated.fixed]
        sums = [open_probability(gated.log_alpha, *self.stretch).sum() for gated in found]
        return self.weight * torch.stack(sums).sum() if sums else None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Project at the end of the burn-in, and within it every `project_every` steps."""
        if step == self.last_of_burn_in:
            self._project(model, fix=True)
        elif step < self.last_of_burn_in and self.project_every and (step + 1) % self.project_every == 0:
            self._project(model, fix=False)

    def settled(self, model: nn.Module, step: int) -> bool:
        """Whether the mask is fixed."""
        return all(gated.fixed for gated in _gated(model).values())

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """The entries under the mask: ⌊p·m⌋ once it is fixed, all candidates before."""
        return sum(int(gated.mask.sum()) for gated in _gated(model).values())

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """δ under the mask, and the mask, coded as in the files of `peft_sam`."""
        counts = [(int(gated.mask.sum()), gated.mask.numel()) for gated in _gated(model).values()]
        return sum(code_length(entries, numel) + 4 * entries for entries, numel in counts if entries)

    def _project(self, model: nn.Module, fix: bool) -> None:
        gated = _gated(model)
        modes = {name: one.training for name, one in gated.items()}
        with torch.no_grad():
            deltas = {name: one.eval().delta() for name, one in gated.items()}
        chosen = choose(deltas, score="magnitude", density=self.density).indices
        for name, one in gated.items():
            mask = torch.zeros_like(one.mask)
            mask.view(-1)[chosen[name].to(mask.device)] = True
            one.train(modes[name]).project(mask, fix)


def _gated(model: nn.Module) -> dict[str, Gated]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Gated)}


def candidates(model: nn.Module, setup: Setup) -> dict[str, nn.Parameter]:
    """The parameters that the candidate modules own, by name, in the model's order."""
    wanted = set(setup.candidates)
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in wanted}
