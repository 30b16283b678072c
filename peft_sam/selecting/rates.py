"""Learning rates that are known to train a sparse adapter, and a word where a Trainer's is far from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

# The lowest and the highest of the rates, times the share of the gradient that the selected entries have, that were
# best of those tried: AdamW, supervised, MiniLM on three tasks and SmolLM2-135M on text (`docs/rates.md`).
LOW, HIGH = 5e-5, 3e-4
# Rates so many times below or above count as far.
FAR = 4


class RateWarning(UserWarning):
    """A Trainer's learning rate is far from those that are known to train a sparse adapter."""


class RateCheck(TrainerCallback):
    """Warns when training begins, in one line, where the rate of an adapter's values is more than four times below or
    above those known for their share.

    Nothing is known, and nothing said, of other optimizers than AdamW, nor of preference and reinforcement learning,
    whose trainers have a `beta`; nor of a selection that does not know its share.
    """

    def __init__(self, values: Iterable[Tensor], share: float) -> None:
        self.values, self.share = {id(one) for one in values}, share

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        """Look at the optimizer that there is now."""
        inner = getattr(optimizer, "optimizer", optimizer)  # of Accelerate's
        known = isinstance(inner, Optimizer) and type(inner).__name__.startswith("AdamW")
        if not known or not self.share or hasattr(args, "beta"):
            return
        low, high = LOW / self.share, HIGH / self.share
        for group in inner.param_groups:
            rate = group.get("initial_lr", group["lr"])  # before the scheduler's warm-up
            if self.values.isdisjoint(map(id, group["params"])) or low / FAR <= rate <= high * FAR:
                continue
            warnings.warn(
                f"the learning rate {rate:g} is far from what trained a sparse adapter best where it was measured: "
                f"{low:.2g} to {high:.2g} for entries that have {self.share:.2%} of the gradient. `trainer.optimizer = "
                "create_sam_optimizer(model, torch.optim.AdamW, lr=1e-4)` brings the rate that fits.",
                RateWarning,
                stacklevel=2,
            )
            return
