"""The paper's theory beside what it bounds: `python -m benchmarks.paper.theory`, two to three minutes on one core.

Stability and generalisation gap of fine-tuned models against the density, with the bounds of the paper's Theorems 1
and 2, whose quantities are estimated on the same problems (`benchmarks.paper.stability` says what they are): a logistic
regression, where every assumption of Theorem 1 holds, and a small network, where the loss is not convex.

The bounds depend on the units of the parameters, because the paper's penalty has weight 1: for θ = cφ the bound on the
stability is 2c²ρ² / ((c²Λ_min + 2(1 − p)) n), and by c alone its slope in p can be made large or small.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.paper.small import DECAY, PROBLEMS, problems
from benchmarks.paper.stability import (
    Problem,
    Stability,
    generalisation_bound,
    leave_one_out,
    stability_bound,
)
from peft_sam import choose
from peft_sam.choosing.threshold import budget_of

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SAMPLES = 60
DELTA = 0.05  # δ of Theorem 2
# The model of Theorem 1, and the sparse ones: SAM's mask is chosen anew without each sample, as a retraining does.
PENALTY, RANDOM, MAGNITUDE, SAM, SAM_KEPT = "penalty", "random", "magnitude", "SAM", "SAM, mask kept"
KINDS = (PENALTY, RANDOM, MAGNITUDE, SAM, SAM_KEPT)
RESULT = Path(__file__).parent.parent / "results" / "paper" / "theory.json"


def support_of(problem: Problem, score: str, density: float, seed: int, gradient: Tensor | None = None) -> Tensor:
    """The mask of a score of `peft_sam`, as positions."""
    statistics = None if gradient is None else {"gradient": {"theta": gradient}}
    chosen = choose({"theta": problem.pretrained}, score=score, density=density, seed=seed, statistics=statistics)
    return chosen.indices["theta"]


def measure(problem: Problem, kind: str, density: float, seed: int) -> Stability:
    """The stability of one kind of model at one density."""
    if kind == PENALTY or density == 1:
        return leave_one_out(problem, torch.arange(problem.m), tether=1 - density)
    if kind in (RANDOM, MAGNITUDE):
        return leave_one_out(problem, support_of(problem, kind, density, seed))
    gradients = problem.gradients(problem.pretrained) / problem.n  # the decay's is zero there
    whole = gradients.sum(0)
    support = support_of(problem, "sam", density, seed, whole)
    if kind == SAM_KEPT:
        return leave_one_out(problem, support)
    others = [support_of(problem, "sam", density, seed, whole - own) for own in gradients]
    return leave_one_out(problem, support, torch.stack(others))


def row(problem: Problem, kind: str, density: float, found: Stability, x: Tensor, y: Tensor) -> dict[str, float]:
    """What is written of one model; `x` and `y` are the test samples, and its largest loss stands for C."""
    train, test = problem.losses(found.theta), problem.losses(found.theta, x, y)
    largest = float(torch.cat([train, test]).max())
    bound = stability_bound(found.rho, found.smallest, 1 - density, problem.n)
    under = stability_bound(found.rho_support, found.smallest_support, 0.0, problem.n)
    return {
        "measured": found.measured,
        "bound": bound,
        "bound_support": bound if kind == PENALTY else under,
        "rho": found.rho,
        "rho_support": found.rho_support,
        "smallest": found.smallest,
        "smallest_support": found.smallest_support,
        "train": float(train.mean()),
        "test": float(test.mean()),
        "gap": float(test.mean() - train.mean()),
        "largest": largest,
        "gap_bound": generalisation_bound(largest, bound, problem.n, DELTA),
    }


def sweep(
    name: str, seeds: Iterable[int], densities: Iterable[float] = DENSITIES, samples: int = SAMPLES
) -> list[dict[str, Any]]:
    """All kinds of models of a problem at all densities. At density 1 all are the same one."""
    rows = []
    for seed, problem, x, y in problems(name, seeds, samples):
        for density in densities:
            about = {"problem": name, "seed": seed, "density": density, "k": budget_of(density, problem.m)}
            for kind in KINDS if density < 1 else KINDS[:1]:
                found = row(problem, kind, density, measure(problem, kind, density, seed), x, y)
                rows += [{**about, "kind": other, **found} for other in (KINDS if density == 1 else [kind])]
    return rows


def over_seeds(rows: list[dict[str, Any]], key: str) -> dict[tuple[str, str, float], tuple[float, float]]:
    """(problem, kind, density) → mean and standard deviation over seeds."""
    values = defaultdict(list)
    for one in rows:
        values[one["problem"], one["kind"], one["density"]].append(one[key])
    return {
        at: (statistics.fmean(of), statistics.stdev(of) if len(of) > 1 and math.inf not in of else 0.0)
        for at, of in values.items()
    }


def table(rows: list[dict[str, Any]], problem: str) -> str:
    """Measured stability of all kinds beside the bound, as Markdown."""
    measured, bounds, gap = (over_seeds(rows, key) for key in ("measured", "bound", "gap_bound"))
    lines = [
        f"**{problem}**: mean |ℓ(A(Sⁱ), zᵢ) − ℓ(A(S), zᵢ)| ± standard deviation over seeds; {PENALTY}: the dense model "
        "of Theorem 1, all others: sparse models",
        "",
        "| p | " + " | ".join(KINDS) + " | bound, Theorem 1 | R̂ plus, Theorem 2 |",
        "|---:" * (len(KINDS) + 3) + "|",
    ]
    for density in sorted({one["density"] for one in rows if one["problem"] == problem}):
        cells = ["{:.3f} ± {:.3f}".format(*measured[problem, kind, density]) for kind in KINDS]
        ends = (f"{of[problem, PENALTY, density][0]:.3g}" for of in (bounds, gap))
        lines.append(f"| {density:g} | " + " | ".join([*cells, *ends]) + " |")
    return "\n".join(lines)


def findings(rows: list[dict[str, Any]], problem: str) -> list[str]:
    """Where the measured values and the paper's story agree and where not; every word follows from the numbers."""
    mine = [one for one in rows if one["problem"] == problem]
    measured, bounds = over_seeds(mine, "measured"), over_seeds(mine, "bound")
    own = [one for one in mine if one["kind"] == PENALTY]
    masks = [one for one in mine if one["kind"] != PENALTY and one["density"] < 1]
    sparse = [p for p in sorted({one["density"] for one in mine}) if p < 1]
    first, last = sparse[0], sparse[-1]

    def growth(of: Mapping[Any, tuple[float, float]], kind: str) -> float:
        return of[problem, kind, last][0] / of[problem, kind, first][0]

    def span(values: Iterable[float]) -> str:
        found = sorted(values)
        return f"{found[0]:.3g} to {found[-1]:.3g}"

    holds = [one for one in own if one["smallest"] >= 0]
    over = sum(one["measured"] > one["bound"] for one in holds)
    said = [
        f"Λ_min ≥ 0, which Theorem 1 assumes, holds in {len(holds)} of {len(own)} fits of its own model"
        + ("." if len(holds) == len(own) else f"; elsewhere it is down to {min(one['smallest'] for one in own):.3g}."),
    ]
    if holds:
        said.append(
            f"There its bound is {span(one['bound'] / one['measured'] for one in holds)} times the measured value and "
            f"is exceeded {over} times."
        )
    said += [
        f"From p = {first:g} to {last:g} the bound grows {growth(bounds, PENALTY):.2f}-fold, what it bounds "
        f"{growth(measured, PENALTY):.2f}-fold; the sparse models, which the theorem does not cover, "
        + ", ".join(f"{growth(measured, kind):.2f}-fold ({kind})" for kind in KINDS[1:4])
        + ".",
        f"The bound with 2(1 − p) is exceeded by {sum(one['measured'] > one['bound'] for one in masks)} of the "
        f"{len(masks)} sparse models; the proof repeated under the mask gives "
        f"{span(one['bound_support'] / one['measured'] for one in masks)} times their measured values.",
    ]
    for kind in KINDS[1:4]:
        means = {p: measured[problem, kind, p][0] for p in (*sparse, 1.0) if (problem, kind, p) in measured}
        worst = max(means, key=means.__getitem__)
        rising = all(means[a] <= means[b] for a, b in pairwise(sorted(means)))
        said.append(
            f"{kind}: on average sparser is {'always' if rising else 'not always'} more stable; least at p = {worst:g}."
        )
    against = {p: measured[problem, SAM, p][0] / measured[problem, RANDOM, p][0] for p in sparse}
    kept = {p: measured[problem, SAM, p][0] / measured[problem, SAM_KEPT, p][0] for p in sparse}
    said += [
        "SAM's measured value over the random mask's, same p: "
        + ", ".join(f"{ratio:.2f} (p = {p:g})" for p, ratio in against.items())
        + ". The bound knows no difference between masks.",
        "Choosing SAM's mask anew without the sample, instead of keeping it, multiplies its value by "
        + ", ".join(f"{ratio:.2f} (p = {p:g})" for p, ratio in kept.items())
        + ".",
    ]
    vacuous = sum(one["gap_bound"] > one["largest"] for one in own if one["density"] < 1)
    said.append(
        f"Theorem 2 adds {span(one['gap_bound'] for one in own if one['density'] < 1)} to R̂, where the measured gap of "
        f"its model is {span(one['gap'] for one in own if one['density'] < 1)} and no loss exceeds "
        f"{max(one['largest'] for one in own):.3g}: more than the largest loss in {vacuous} of "
        f"{sum(one['density'] < 1 for one in own)} fits, so it says nothing there."
    )
    return said


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured values with error bars, and bounds, against p."""
    names = list(dict.fromkeys(one["problem"] for one in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(5.5 * len(names), 7), constrained_layout=True, squeeze=False)
    lines = (("measured", "bound", "stability"), ("gap", "gap_bound", "generalisation gap"))
    for column, name in enumerate(names):
        for axis, (value, bound, title) in zip(axes[:, column], lines, strict=True):
            values, bounds, under = (over_seeds(rows, key) for key in (value, bound, "bound_support"))
            densities = sorted({one["density"] for one in rows})
            for number, kind in enumerate(KINDS):
                means, deviations = zip(*(values[name, kind, p] for p in densities), strict=True)
                axis.errorbar(densities, means, deviations, capsize=2, color=f"C{number}", label=kind)
            axis.plot(densities, [bounds[name, PENALTY, p][0] for p in densities], "--k", label="bound of the paper")
            if value == "measured":
                for number, kind in ((1, RANDOM), (4, SAM_KEPT)):
                    heights = [under[name, kind, p][0] for p in densities]
                    axis.plot(densities, heights, ":", color=f"C{number}", label=f"bound under the mask, {kind}")
                axis.set_yscale("log")
            else:
                axis.set_yscale("symlog", linthresh=0.1)
            axis.set_xscale("log")
            axis.set_title(f"{title}, {name}", fontsize=10)
            axis.set_xlabel("p")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside upper center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(path: Path, about: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows as JSON, one a line, numbers to six digits; where there is no bound it is null."""

    def brief(value: Any) -> Any:
        return (None if value == math.inf else float(f"{value:.6g}")) if isinstance(value, float) else value

    lines = ",\n  ".join(json.dumps({key: brief(value) for key, value in one.items()}) for one in rows)
    path.write_text(json.dumps({**about, "results": []}, indent=1).replace("[]", f"[\n  {lines}\n ]") + "\n")


def main() -> None:
    """Measure, print, write, draw."""
    from benchmarks import common  # here, because it changes what transformers logs

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON file; the figure lies beside it as .svg")
    args = parser.parse_args()
    start, rows = time.perf_counter(), []
    for name in PROBLEMS:
        for seed in tqdm(range(args.seeds), desc=name, dynamic_ncols=True):
            rows += sweep(name, [seed])
        print("\n".join(["", table(rows, name), "", *(f"* {said}" for said in findings(rows, name)), ""]), flush=True)
    settings = {"samples": SAMPLES, "decay": DECAY, "delta": DELTA, "seeds": args.seeds}
    settings["seconds"] = round(time.perf_counter() - start, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, {"environment": common.environment("cpu"), "settings": settings}, rows)
    draw(rows, args.out.with_suffix(".svg"))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
