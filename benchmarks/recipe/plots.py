"""Two figures of the recipe's lines: quality over size, and quality over work; a panel for each test bed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from benchmarks.recipe.report import beds, is_loss, result, work
from benchmarks.rig.lines import Line

# Figure → what its x axis says, whether it is logarithmic, x of a method's lines, and whether runs of other numbers
# of steps are in it.
FIGURES: dict[str, tuple[str, bool, Callable[[list[Line]], float], bool]] = {
    "size": ("trained entries", True, lambda lines: lines[0]["trained"], False),
    "work": ("CPU seconds of choosing and training", False, work, True),
}


def draw(lines: Iterable[Line], folder: Path) -> list[Path]:
    """Both figures as svg, where there are results of fresh seeds; error bars are standard errors."""
    found, paths = list(beds(lines).items()), []
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    kinds = sorted({entrant.kind for _, runs in found for entrant in runs})
    for name, (says, logarithmic, x, longer) in FIGURES.items():
        with plt.rc_context({"svg.hashsalt": "recipe"}):  # the same lines make the same file
            size = (5.5 * len(found), 4.5)
            figure, axes = plt.subplots(1, len(found), figsize=size, constrained_layout=True, squeeze=False)
            for axis, (common, runs) in zip(axes[0], found, strict=True):
                families = defaultdict(list)
                runs = {entrant: of for entrant, of in runs.items() if longer or entrant.other_steps is None}
                for entrant, of in runs.items():
                    own = list(of.values())
                    height = result(of)
                    families[entrant.kind].append((x(own), height.mean, height.error))
                for family, points in families.items():
                    at, heights, errors = zip(*sorted(points), strict=True)
                    colour = f"C{kinds.index(family)}"  # the same in all panels
                    axis.errorbar(at, heights, errors, fmt="o", capsize=2, label=family, color=colour)
                told = dict(common)
                if logarithmic:
                    _set_logarithmic(axis, [at for points in families.values() for at, _, _ in points])
                axis.set_xlabel(says)
                axis.set_ylabel("test loss" if is_loss(own[0]) else "test metric, per cent")
                axis.set_title(f"{told['model']}, {told['task']}, {told['steps']} steps", fontsize=10)
                axis.legend(fontsize=8)
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            plt.close(figure)
    return paths


def _set_logarithmic(axis: Axes, every: list[float]) -> None:
    """Have the x axis be logarithmic, with few and short numbers, however near to each other the points are."""
    axis.set_xscale("log")
    axis.set_xlim(min(every) / 2, max(every) * 2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
