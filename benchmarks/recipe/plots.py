"""Two figures of the recipe's lines: quality over size, and quality over work; a panel for each test bed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.recipe.report import beds, is_loss, result, work
from benchmarks.rig.lines import Line

# Figure → what its x axis says, its scale, and x of a method's lines.
FIGURES: dict[str, tuple[str, str, Callable[[list[Line]], float]]] = {
    "size": ("trained entries", "log", lambda lines: lines[0]["trained"]),
    "work": ("CPU seconds of choosing and training", "linear", work),
}


def draw(lines: Iterable[Line], folder: Path) -> list[Path]:
    """Both figures as svg, where there are results of fresh seeds; error bars are standard errors."""
    found, paths = list(beds(lines).items()), []
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    kinds = sorted({entrant.kind for _, runs in found for entrant in runs})
    for name, (says, scale, x) in FIGURES.items():
        with plt.rc_context({"svg.hashsalt": "recipe"}):  # the same lines make the same file
            size = (5.5 * len(found), 4.5)
            figure, axes = plt.subplots(1, len(found), figsize=size, constrained_layout=True, squeeze=False)
            for axis, (common, runs) in zip(axes[0], found, strict=True):
                families = defaultdict(list)
                for entrant, of in runs.items():
                    own = list(of.values())
                    height = result(of)
                    families[entrant.kind].append((x(own), height.mean, height.error))
                for family, points in families.items():
                    at, heights, errors = zip(*sorted(points), strict=True)
                    colour = f"C{kinds.index(family)}"  # the same in all panels
                    axis.errorbar(at, heights, errors, fmt="o", capsize=2, label=family, color=colour)
                told = dict(common)
                axis.set_xscale(scale)
                axis.set_xlabel(says)
                axis.set_ylabel("test loss" if is_loss(own[0]) else "test metric, per cent")
                axis.set_title(f"{told['model']}, {told['task']}, {told['steps']} steps", fontsize=10)
                axis.legend(fontsize=8)
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            plt.close(figure)
    return paths
