"""Learning rates that are known to train a sparse adapter, and a word where a Trainer's is far from them."""

from __future__ import annotations

import warnings

from transformers import Trainer

# The lowest and the highest of the rates, times the share of the gradient that the selected entries have, that were
# best of those tried: AdamW, supervised, MiniLM on three tasks and SmolLM2-135M on text (`docs/rates.md`).
LOW, HIGH = 5e-5, 3e-4
# Rates so many times below or above count as far.
FAR = 4


class RateWarning(UserWarning):
    """A Trainer's learning rate is far from those that are known to train a sparse adapter."""


def warn_of_rate(trainer: Trainer, share: float) -> None:
    """Warn, in one line, where the rate is more than four times below or above those known for such a share.

    Nothing is known, and nothing said, of other optimizers than AdamW, nor of preference and reinforcement learning,
    whose trainers have a `beta`; nor of a selection that does not know its share.
    """
    adamw = trainer.optimizer is None and str(trainer.args.optim).lower().rpartition(".")[2].startswith("adamw")
    if not share or not adamw or hasattr(trainer.args, "beta"):
        return
    rate, low, high = trainer.args.learning_rate, LOW / share, HIGH / share
    if low / FAR <= rate <= high * FAR:
        return
    warnings.warn(
        f"learning_rate={rate:g} is far from what trained a sparse adapter best where it was measured: {low:.2g} to "
        f"{high:.2g} for entries that have {share:.2%} of the gradient. create_sam_optimizer(model, torch.optim.AdamW, "
        "lr=1e-4) brings the rate that fits.",
        RateWarning,
        stacklevel=3,
    )
