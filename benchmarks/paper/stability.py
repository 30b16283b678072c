"""Pointwise hypothesis stability of sparse fine-tuning: measured by leaving samples out, and bounded as in the paper.

The theory of Fu et al. 2022 (arXiv 2211.15583), in its own order. A sparse fine-tuned model minimises L(θ) over
θ = θ⁰ + MΔ, with L(θ) = 1/n Σ ℓ(θ, z_i). The constraint ‖(I − M)(θ − θ⁰)‖² = 0 becomes a penalty of weight 1, and for
a random mask of density p its mean is (1 − p) ‖θ − θ⁰‖². Theorem 1 is about the minimiser A(S) of

    L(θ) + (1 − p) ‖θ − θ⁰‖².

If ℓ is ρ-Lipschitz, the model A(S^i) without sample i is close to A(S), and the Hessian of L at A(S) has the smallest
eigenvalue Λ_min ≥ 0, then

    E |ℓ(A(S^i), z_i) − ℓ(A(S), z_i)|  ≤  β = 2ρ² / ((Λ_min + 2(1 − p)) n),

and by Theorem 2, for losses in [0, C], with probability 1 − δ (Bousquet & Elisseeff 2002, Theorem 11)

    R ≤ R̂ + √((C² + 12 C n β) / (2 n δ)) = R̂ + √((C² + 24 C ρ² / (Λ_min + 2(1 − p))) / (2 n δ)).

The model of the theorem is a dense one with a penalty; a mask enters by its density alone. What is trained in practice
is the model of one mask. For it the same proof holds in the coordinates under the mask: β = 2ρ_M² / (Λ_M n), ρ_M the
Lipschitz constant in these coordinates and Λ_M the smallest eigenvalue of the Hessian's block. Both are measured here.

Two choices of ours. L contains α/2 ‖θ − θ⁰‖², a weight decay that is the same for all models, without which a mask of
more than n entries has no unique minimiser. A sample is left out by setting its weight from 1/n to 0, the others keep
theirs (the paper divides by n − 1 instead, which scales the penalty by 1 − 1/n besides): so ρ is that of ℓ alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

# points of the way from A(S) to A(S^i) at which the gradient is looked at
ON_THE_WAY = 5
TOLERANCE = 1e-9
ITERATIONS = 200


@dataclass(frozen=True)
class Problem:
    """Losses of samples as a function of m parameters, where fine-tuning starts from, and the data. All float64.

    Attributes:
        loss: (θ (m,), x of one sample, y of one sample) → ℓ ≥ 0, a scalar.
        pretrained: θ⁰.
        x, y: n samples.
        decay: α.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    pretrained: Tensor
    x: Tensor
    y: Tensor
    decay: float

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.y)

    @property
    def m(self) -> int:
        """Parameters."""
        return len(self.pretrained)

    def losses(self, theta: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """ℓ of each sample, of the problem's own by default, (n,)."""
        return vmap(self.loss, (None, 0, 0))(theta, self.x if x is None else x, self.y if y is None else y)

    def risk(self, theta: Tensor) -> Tensor:
        """L(θ), the decay included."""
        return self.losses(theta).mean() + self.decay / 2 * (theta - self.pretrained).square().sum()

    def gradients(self, theta: Tensor) -> Tensor:
        """∇ℓ of each sample at θ, (n, m)."""
        return vmap(grad(self.loss), (None, 0, 0))(theta, self.x, self.y)


def smallest_eigenvalue(problem: Problem, theta: Tensor, support: Tensor | None = None) -> float:
    """Λ_min of ∇²L at θ, or of its block of the entries in `support`."""
    curvature = hessian(problem.risk)(theta)
    if support is not None:
        curvature = curvature[support][:, support]
    return float(torch.linalg.eigvalsh(curvature)[0])


def minimise(problem: Problem, weights: Tensor, supports: Tensor, start: Tensor, tether: float = 0.0) -> Tensor:
    """Minimise Σ w_i ℓ(θ, z_i) + (α/2 + tether) ‖θ − θ⁰‖² over the entries in a support, for many problems at once.

    Newton's method with Levenberg's damping where a step fails or the Hessian is not positive, to a gradient of 1e-9.

    Args:
        weights: of the samples, (B, n).
        supports: positions of the entries that are trained, (B, k).
        start: where Δ = θ − θ⁰ starts there, (B, k).
        tether: weight of the penalty, 1 − p for the model of Theorem 1.

    Returns:
        θ, (B, m).

    Raises:
        RuntimeError: if it does not converge.
    """

    def objective(delta: Tensor, support: Tensor, weight: Tensor) -> Tensor:
        theta = problem.pretrained.scatter_add(0, support, delta)
        return weight @ problem.losses(theta) + (problem.decay / 2 + tether) * delta.square().sum()

    value, gradient, curvature = vmap(objective), vmap(grad(objective)), vmap(hessian(objective))
    deltas, dampings = start.clone(), torch.zeros(len(start), dtype=start.dtype)
    for _ in range(ITERATIONS):
        slopes = gradient(deltas, supports, weights)
        open_ = (slopes.abs().amax(1) > TOLERANCE).nonzero().flatten()
        if len(open_) == 0:
            break
        now, where, weight, damping = deltas[open_], supports[open_], weights[open_], dampings[open_]
        hessians = curvature(now, where, weight)
        while True:
            factor, failed = torch.linalg.cholesky_ex(hessians + torch.diag_embed(damping[:, None].expand_as(now)))
            if not failed.any():
                break
            damping = torch.where(failed > 0, (10 * damping).clamp(min=1e-3), damping)
        new = now - torch.cholesky_solve(slopes[open_, :, None], factor)[..., 0]
        before, after = value(now, where, weight), value(new, where, weight)
        better = after <= before + 1e-12 * (1 + before.abs())
        deltas[open_] = torch.where(better[:, None], new, now)
        eased = torch.where(damping > 1e-6, damping / 10, 0.0)
        dampings[open_] = torch.where(better, eased, (10 * damping).clamp(min=1e-3))
    else:
        raise RuntimeError(f"{len(open_)} of {len(start)} fits did not converge in {ITERATIONS} steps.")
    return problem.pretrained.repeat(len(deltas), 1).scatter_add(1, supports, deltas)


def stability_bound(rho: float, smallest: float, tether: float, n: int) -> float:
    """2ρ² / ((Λ_min + 2 tether) n); infinite where that curvature is not positive and there is no bound."""
    curvature = smallest + 2 * tether
    return 2 * rho**2 / (curvature * n) if curvature > 0 else math.inf


def generalisation_bound(largest: float, stability: float, n: int, delta: float) -> float:
    """√((C² + 12 C n β) / (2 n δ)), what Theorem 2 adds to the empirical risk."""
    return math.sqrt((largest**2 + 12 * largest * n * stability) / (2 * n * delta))


@dataclass(frozen=True)
class Stability:
    """What was measured of one model.

    Attributes:
        theta: A(S).
        measured: mean over i of |ℓ(A(S^i), z_i) − ℓ(A(S), z_i)|.
        rho: the largest ‖∇ℓ(θ, z_i)‖ on the ways from A(S) to A(S^i), over all i: the least ρ that the proof needs.
        rho_support: the same in the coordinates of the support.
        smallest: Λ_min of ∇²L at A(S).
        smallest_support: of its block of the support.
    """

    theta: Tensor
    measured: float
    rho: float
    rho_support: float
    smallest: float
    smallest_support: float


def leave_one_out(problem: Problem, support: Tensor, others: Tensor | None = None, tether: float = 0.0) -> Stability:
    """Train on all samples, then again without each of them, from where the first training ended.

    Args:
        support: of A(S), (k,).
        others: supports of the A(S^i), (n, k), if they differ; a mask chosen by data is chosen anew without sample i.
        tether: as in `minimise`.
    """
    n = problem.n
    even = torch.full((1, n), 1 / n, dtype=problem.x.dtype)
    whole = minimise(problem, even, support[None], torch.zeros_like(support[None], dtype=even.dtype), tether)[0]
    others = support.expand(n, -1) if others is None else others
    weights = even.repeat(n, 1).fill_diagonal_(0.0)
    without = minimise(problem, weights, others, (whole - problem.pretrained)[others], tether)
    own = vmap(problem.loss)
    measured = (own(without, problem.x, problem.y) - problem.losses(whole)).abs().mean()
    rho = rho_support = 0.0
    for share in torch.linspace(0, 1, ON_THE_WAY).tolist():
        slopes = vmap(grad(problem.loss))(torch.lerp(whole.expand_as(without), without, share), problem.x, problem.y)
        rho = max(rho, float(slopes.norm(dim=1).max()))
        rho_support = max(rho_support, float(slopes[:, support].norm(dim=1).max()))
    smallest, smallest_support = (smallest_eigenvalue(problem, whole, of) for of in (None, support))
    return Stability(whole, float(measured), rho, rho_support, smallest, smallest_support)
