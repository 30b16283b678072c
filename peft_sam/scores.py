"""Scores: what an entry of a parameter is worth.

A score is a pure, elementwise function whose argument names say what it needs, out of

* `weight`            θ⁰, the entry's pretrained value;
* `gradient`          g = ∂L/∂θ at θ⁰, L the *mean* loss over the examples;
* `movement`          θ¹ − θ⁰, how far a short dense training moves the entry;
* `squared_gradient`  the mean over micro-batches b of g_b², weighted by their sizes;
* `noise`             a seeded uniform number in [0, 1);
* `is_bias`           1 for an entry of a bias (a vector named so), else 0.

It returns a non-negative tensor of the same shape; the k entries with the largest values are selected. A new score
is one function and one row of `SCORES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# What the pass over the data accumulates; the other inputs of a score need no data.
DATA_INPUTS = ("gradient", "squared_gradient", "curvature", "movement")
# What is made from a parameter's name and shape and the seed.
MADE_INPUTS = ("noise", "is_bias")
# How many entries are selected: a share of all candidates together, or of each.
BUDGETS = ("global", "tensor")


def sam(gradient: Tensor) -> Tensor:
    """|g|, which orders entries as g² does: the score of SAM, Fu et al. 2022 (arXiv 2211.15583), Theorem 3.

    g is the gradient of the mean loss, so g² = (mean gradient)², not the mean of squared gradients. The square is
    left out because it would only round, underflow and overflow; a threshold τ here is a threshold τ² on g².
    """
    return gradient.abs()


def sam_curvature(gradient: Tensor, curvature: Tensor) -> Tensor:
    """|g| / √h, which orders entries as g²/h does: Theorem 3 of Fu et al. 2022 before h is dropped.

    For a loss whose Hessian is diag(h), training the k entries with the largest g²/h lowers it the most of all masks
    of k entries. h is a damped estimate of the Hessian's diagonal, positive (`peft_sam.curvature`).
    """
    return gradient.abs() / curvature.sqrt()


def fisher(squared_gradient: Tensor) -> Tensor:
    """Mean of g_b² over micro-batches b: the diagonal of the empirical Fisher information over micro-batches.

    g_b is the gradient of the mean loss of one batch as the loader gives it. With batch size 1 this is the
    empirical Fisher diagonal over examples (the mask of FISH, Sung et al. 2021, arXiv 2111.09839).
    """
    return squared_gradient


def movement(movement: Tensor) -> Tensor:
    """|θ¹ − θ⁰|, θ¹ after a short full fine-tuning, which is then undone (`peft_sam.movement`).

    The lottery-ticket mask of Ansell et al. 2022 (arXiv 2110.07560). In the quadratic model of Theorem 3 the optimum
    lies at θ⁰ − g/h, and the k entries with the largest h (θ¹ − θ⁰)² lower it the most: with h bounded by one number,
    as there, the order is this one, of an optimum that is walked towards and not extrapolated.
    """
    return movement.abs()


def magnitude(weight: Tensor) -> Tensor:
    """|θ⁰|: the largest pretrained weights ("MagPruning" in Fu et al. 2022, after Han et al. 2015)."""
    return weight.abs()


def random(noise: Tensor) -> Tensor:
    """A seeded uniform number: a random mask, the same on every device and for every process count."""
    return noise


def bias(is_bias: Tensor, noise: Tensor) -> Tensor:
    """1 + noise for a bias, noise for all else: the biases first, a random mask in what the budget leaves.

    BitFit (Zaken et al. 2021, arXiv 2106.10199) for a global budget of as many entries as there are biases.
    """
    return is_bias + noise


@dataclass(frozen=True)
class Score:
    """A row of the table: the function of a score and the inputs that it needs."""

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]

    @property
    def statistics(self) -> tuple[str, ...]:
        """The inputs that come from data; empty for a score that selects without data."""
        return tuple(name for name in self.inputs if name in DATA_INPUTS)

    @property
    def reads_tensors(self) -> bool:
        """Whether it reads numbers of the parameters or of the data, not only names, shapes and the seed."""
        return not set(self.inputs) <= set(MADE_INPUTS)


SCORES: dict[str, Score] = {
    function.__name__: Score(function, tuple(inspect.signature(function).parameters))
    for function in (sam, sam_curvature, movement, fisher, magnitude, random, bias)
}
