"""Two small problems for the theory: is a digit 5 or more, for images that are shifted by a pixel after pretraining.

Both have more parameters than the samples that are drawn: a logistic regression on random features, whose loss is
convex, and a network with one hidden layer, whose loss is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d, softplus

from benchmarks.paper.stability import Problem

DECAY = 0.01  # α
PRETRAINING = 900  # samples
FEATURES = 127
HIDDEN = 6


def logistic(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The logistic loss of a linear score, y = ±1."""
    return softplus(-y * (x @ theta))


def network(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The logistic loss of a network with one hidden layer of tanh."""
    inner, bias, outer, last = theta.split([len(x) * HIDDEN, HIDDEN, HIDDEN, 1])
    return softplus(-y * (torch.tanh(inner.view(HIDDEN, -1) @ x + bias) @ outer + last[0]))


def random_features(images: Tensor) -> Tensor:
    """tanh of random projections, and a constant."""
    generator = torch.Generator().manual_seed(0)
    pixels = images.flatten(1)
    projection = torch.randn(pixels.shape[1], FEATURES, generator=generator, dtype=images.dtype)
    features = torch.tanh(2 * pixels @ projection / pixels.shape[1] ** 0.5)
    return torch.cat([features, torch.ones(len(images), 1, dtype=images.dtype)], 1)


def pixels(images: Tensor) -> Tensor:
    """Means of 2 × 2 pixels."""
    return avg_pool2d(images[:, None], 2).flatten(1)


PROBLEMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], int]] = {
    "logistic regression": (logistic, random_features, FEATURES + 1),
    "network": (network, pixels, 16 * HIDDEN + 2 * HIDDEN + 1),
}


def pretrained(problem: Problem) -> Tensor:
    """A minimum of the problem's risk near its start; how near does not matter."""
    theta = problem.pretrained.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        risk = problem.risk(theta)
        risk.backward()
        return risk

    optimizer.step(closure)
    return theta.detach()


def problems(name: str, seeds: Iterable[int], samples: int) -> Iterable[tuple[int, Problem, Tensor, Tensor]]:
    """For each seed other samples of the same task: seed, problem, and the x and y of all samples not drawn."""
    loss, features, m = PROBLEMS[name]
    digits = load_digits()
    images = torch.from_numpy(digits.images) / 16
    labels = torch.from_numpy((digits.target >= 5) * 2.0 - 1)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    before, rest = order[:PRETRAINING], order[PRETRAINING:]
    start = 0.5 * torch.randn(m, generator=generator, dtype=images.dtype)
    origin = pretrained(Problem(loss, start, features(images[before]), labels[before], 1e-3))
    x, y = features(images.roll(1, dims=2)[rest]), labels[rest]
    for seed in seeds:
        drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        train, test = drawn[:samples], drawn[samples:]
        yield seed, Problem(loss, origin, x[train], y[train], DECAY), x[test], y[test]
