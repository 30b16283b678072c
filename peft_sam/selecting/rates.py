"""Learning rates that are known to train a sparse adapter, and a word where a Trainer's is far from them."""

from __future__ import annotations

import warnings

from transformers import Trainer

# score → (density up to which, the lowest and the highest of the rates that were best of those tried there): AdamW,
# supervised, MiniLM on CoLA and STS-B and SmolLM2-135M on text (`docs/rates.md`)
KNOWN: dict[str, tuple[tuple[float, float, float], ...]] = {
    "sam": ((0.01, 1e-3, 3e-3), (0.2, 3e-4, 3e-4)),
    "sam_curvature": ((0.01, 3e-3, 1e-2), (0.02, 1e-3, 1e-3)),
    "movement": ((0.01, 3e-3, 3e-3),),
    "random": ((0.01, 3e-3, 3e-2),),
}
# Rates so many times below or above count as far: on a grid of 1e-3 and 3e-3, 3e-4 does not yet, 2e-4 does.
FAR = 4


class RateWarning(UserWarning):
    """A Trainer's learning rate is far from those that are known to train a sparse adapter."""


def warn_of_rate(trainer: Trainer, score: str, density: float) -> None:
    """Warn, in one line, where the rate is more than four times below or above those known for score and density.

    Nothing is known, and nothing said, of other optimizers than AdamW, nor of preference and reinforcement learning,
    whose trainers have a `beta`.
    """
    adamw = trainer.optimizer is None and str(trainer.args.optim).lower().rpartition(".")[2].startswith("adamw")
    row = next((row for row in KNOWN.get(score, ()) if density <= row[0]), None)
    if row is None or not adamw or hasattr(trainer.args, "beta"):
        return
    rate, (_, low, high) = trainer.args.learning_rate, row
    if low / FAR <= rate <= high * FAR:
        return
    known = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    warnings.warn(
        f"learning_rate={rate:g} is far from what trained a sparse adapter best where it was measured: {known} with "
        f"score {score!r} at a density of {density:.2g}.",
        RateWarning,
        stacklevel=3,
    )
