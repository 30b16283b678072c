"""Methods that are a `SamConfig`: SAM, and other scores under the same budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.rig.masked import candidates
from benchmarks.rig.method import Method, Setup, mean_loss, named_head, named_rest
from benchmarks.rig.methods_peft import saved_bytes
from peft_sam import SamConfig, Selection, accumulate, choose, select_parameters


@dataclass
class Sparse(Method):
    """A sparse adapter on the candidates.

    Attributes:
        score, budget, curvature, damping, probes: as in `SamConfig`.
        max_batches, train_mode: as in `select_parameters`.
        normalise: a row of `NORMALISED`, what is done to the gradient of each tensor before scores are compared, so
            that a global budget does not follow a few tensors with large gradients; "" for nothing.
    """

    name: ClassVar[str] = "sam"
    score: str = "sam"
    budget: Literal["global", "tensor"] = "global"
    curvature: Literal["fisher", "hutchinson"] = "fisher"
    damping: float = 0.1
    probes: int = 4
    max_batches: int | None = None
    train_mode: bool = False
    normalise: str = ""

    def config(self, model: nn.Module, setup: Setup) -> SamConfig:
        """The adapter's configuration for this run."""
        return SamConfig(
            density=setup.density,
            score=self.score,
            budget=self.budget,
            curvature=self.curvature,
            damping=self.damping,
            probes=self.probes,
            seed=setup.seed,
            target_modules=list(setup.candidates),
        )

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Add the adapter and select on the training batches."""
        config = self.config(model, setup)
        selection = self._normalised(model, config, setup) if self.normalise else None
        adapted: Any = get_peft_model(model, config)
        for _, parameter in named_head(adapted, setup):
            parameter.requires_grad_(True)
        if config.needs_data:
            select_parameters(
                adapted,
                setup.batches,
                max_batches=self.max_batches,
                train_mode=self.train_mode,
                selection=selection,
                progress=False,
            )
        return adapted

    def _normalised(self, model: nn.Module, config: SamConfig, setup: Setup) -> Selection:
        if self.normalise not in NORMALISED or self.score != "sam":
            raise ValueError(f"normalise={self.normalise!r} must be of {list(NORMALISED)}, with the score 'sam'.")
        parameters = candidates(model, setup)
        batches = itertools.islice(setup.batches, self.max_batches)
        found = accumulate(
            model,
            parameters,
            batches,
            mean_loss(model),
            train_mode=self.train_mode,
            progress=False,
        )
        normalise = NORMALISED[self.normalise]
        gradient = {name: normalise(tensor, config.density) for name, tensor in found.tensors["gradient"].items()}
        return choose(
            parameters, score="sam", density=config.density, budget=self.budget, statistics={"gradient": gradient}
        )

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """k."""
        return sum(p.numel() for _, p in named_rest(model, setup) if p.requires_grad)

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """The adapter's file."""
        return saved_bytes(model)


@dataclass
class BitFit(Sparse):
    """All biases of the encoder (Zaken et al. 2021): the score "bias" with as many entries as there are."""

    name: ClassVar[str] = "bitfit"
    score: str = "bias"

    def config(self, model: nn.Module, setup: Setup) -> SamConfig:
        """Every module of the encoder that owns parameters is a target."""
        owners = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
        owners = [name for name in owners if not f"{name}.".startswith(tuple(f"{head}." for head in setup.head))]
        rest = dict(named_rest(model, setup))
        biases = sum(p.numel() for name, p in rest.items() if p.ndim == 1 and name.endswith("bias"))
        # half an entry more, so that rounding down finds it
        density = (biases + 0.5) / sum(p.numel() for p in rest.values())
        return SamConfig(density=density, score="bias", seed=setup.seed, target_modules=owners)


def over_its_size(tensor: Tensor, density: float) -> Tensor:
    """The tensor divided by the root mean square of its entries; zeros stay."""
    size = tensor.square().mean().sqrt()
    return tensor / size if size > 0 else tensor


def within_its_share(tensor: Tensor, density: float) -> Tensor:
    """The tensor with zeros for all but the `SHARES` p n largest of its n entries: more than these it cannot win."""
    entries = tensor.flatten()
    most = min(math.ceil(SHARES * density * entries.numel()), entries.numel())
    kept = entries.abs().topk(most).indices
    return torch.zeros_like(entries).index_copy(0, kept, entries[kept]).view_as(tensor)


# How many times its share of a global budget, in proportion to its size, a tensor may win under normalise="cap".
SHARES = 4
# A new way to even out tensors is a function of a gradient and p, and one row.
NORMALISED: dict[str, Callable[[Tensor, float], Tensor]] = {"tensor": over_its_size, "cap": within_its_share}
