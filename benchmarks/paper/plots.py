"""The paper's figures from the lines of results alone.

`sweep`, its Figure 5: mean and standard deviation over seeds of the test and the training metric, against density.
`stability`, its Figure 4: the ranks of the methods by spread over seeds and by score, and Spearman's correlation.
`discontinuity`, its Figure 3: the training loss of each step, of runs that recorded it (`--curve`).
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from scipy.stats import spearmanr

from benchmarks.rig.lines import (
    Common,
    Line,
    averages,
    chosen,
    density_of,
    groups,
    options_of,
    ranks,
    scores,
    spread,
    tasks_of,
    told,
)

# Steps over which a curve of losses is averaged.
WINDOW = 20
# (method, task) → [(density, scores of the seeds), ...] by density.
Sweep = dict[tuple[str, str], list[tuple[float, list[float]]]]


def sweep(lines: Iterable[Line], split: str) -> Sweep:
    """The scores of methods that were run at two densities or more."""
    at: dict[float, list[Line]] = defaultdict(list)
    for line in lines:
        at[density_of(line)].append(line)
    found: Sweep = defaultdict(list)
    for density in sorted(at):
        for where, values in scores(at[density], split).items():
            found[where].append((density, values))
    return {where: points for where, points in found.items() if len(points) > 1}


def draw_sweep(lines: list[Line]) -> Any | None:
    """One row for each task; points of a single seed have no standard deviation."""
    splits = {split: sweep(lines, split) for split in ("test", "train")}
    tasks = tasks_of(splits["test"])
    if not tasks:
        return None
    panels = [(split, what) for split in splits for what in ("mean", "standard deviation")]
    figure, axes = plt.subplots(
        len(tasks), len(panels), figsize=(13, 2.8 * len(tasks)), constrained_layout=True, squeeze=False
    )
    methods, handles = list(dict.fromkeys(method for method, _ in splits["test"])), {}
    for row, task in zip(axes, tasks, strict=True):
        for axis, (split, what) in zip(row, panels, strict=True):
            for number, method in enumerate(methods):
                points = splits[split].get((method, task), [])
                heights = [float(np.mean(v)) if what == "mean" else spread(v) for _, v in points]
                pairs = [(p, height) for (p, _), height in zip(points, heights, strict=True) if height is not None]
                if pairs:
                    handles[method], *_ = axis.plot(*zip(*pairs, strict=True), "o-", color=f"C{number}")
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("density")
            axis.set_title(f"{task}, {split} {what}", fontsize=9)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2, fontsize=8)
    return figure


@dataclass(frozen=True)
class Relation:
    """Ranks of methods by their mean standard deviation over seeds and by their mean score, 1 the best, and ρ and p."""

    stability: dict[str, float]
    performance: dict[str, float]
    rho: float
    p: float


def relation(lines: Iterable[Line]) -> Relation | None:
    """Of methods that have all tasks with two seeds or more; None of fewer than four, or where all are the same."""
    found = {method: both for method, both in averages(scores(lines)).items() if both[1] is not None}
    stability = ranks({method: float(deviation or 0) for method, (_, deviation) in found.items()}, largest_first=False)
    performance = ranks({method: mean for method, (mean, _) in found.items()})
    if len(found) < 4 or len(set(stability.values())) == 1 or len(set(performance.values())) == 1:
        return None
    rho, p = spearmanr(list(stability.values()), list(performance.values()))
    return Relation(stability, performance, float(rho), float(p))


def draw_stability(lines: list[Line]) -> Any | None:
    """One point for each method."""
    found = relation(lines)
    if found is None:
        return None
    figure, axis = plt.subplots(figsize=(6, 5), constrained_layout=True)
    for method, place in found.stability.items():
        axis.plot(place, found.performance[method], "o", color="C0")
        axis.annotate(f" {method}", (place, found.performance[method]), fontsize=7)
    axis.set_xlim(0.5, 1.4 * len(found.stability) + 0.5)  # room for the names
    axis.set_xlabel("rank of stability (1: smallest standard deviation over seeds)")
    axis.set_ylabel("rank of performance (1: highest score)")
    axis.set_title(f"Spearman's ρ = {found.rho:.2f}, p = {found.p:.2g}, {len(found.stability)} methods", fontsize=10)
    return figure


def curves(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """(task, method) → the line of its first seed that has a curve, of the learning rate that was chosen."""
    found = {}
    for (method, task), of in chosen(line for line in lines if "curve" in line).items():
        found[task, method] = min(of, key=lambda line: line["config"]["seed"])
    return found


def running_mean(values: list[float], window: int = WINDOW) -> np.ndarray:
    """The mean of each value and the up to `window` − 1 before it, so that nothing shows before it happens."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_discontinuity(lines: list[Line]) -> Any | None:
    """One panel for each task; the steps at which a method projects are dotted."""
    found = curves(lines)
    tasks = tasks_of((method, task) for task, method in found)
    if not tasks:
        return None
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 3.6), constrained_layout=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        here = {method: line for (there, method), line in found.items() if there == task}
        for number, (method, line) in enumerate(here.items()):
            steps = np.arange(1, len(line["curve"]) + 1)
            axis.plot(steps, line["curve"], color=f"C{number}", alpha=0.2, linewidth=0.5)
            axis.plot(steps, running_mean(line["curve"]), color=f"C{number}", label=method)
            every = int(options_of(line["config"]["method"])[1].get("project_every", 0))
            for step in range(every, len(steps), every) if every else ():
                axis.axvline(step, color=f"C{number}", linestyle=":", linewidth=0.8)
        axis.set_title(f"{task}: training loss, mean of {WINDOW} steps", fontsize=9)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    return figure


# Figure → how it is drawn, and what its lines may differ in besides method, task, seed, learning rate and length.
FIGURES: dict[str, tuple[Callable[[list[Line]], Any | None], tuple[str, ...]]] = {
    "sweep": (draw_sweep, ("density",)),
    "stability": (draw_stability, ()),
    "discontinuity": (draw_discontinuity, ()),
}


def draw(lines: Iterable[Line], folder: Path) -> list[Path]:
    """All figures that the lines suffice for, as svg; one for each configuration, numbered from the second on."""
    lines, paths = list(lines), []
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "paper"}):  # the same lines make the same file
        for name, (make, apart) in FIGURES.items():
            figures = [(make(of), common) for common, of in groups(lines, apart).items()]
            for number, (figure, common) in enumerate((pair for pair in figures if pair[0] is not None), 1):
                paths.append(folder / (f"{name}-{number}.svg" if number > 1 else f"{name}.svg"))
                _save(figure, common, paths[-1])
    return paths


def _save(figure: Any, common: Common, path: Path) -> None:
    figure.supxlabel(textwrap.fill(told(common), int(20 * figure.get_figwidth())), fontsize=5, color="gray")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
