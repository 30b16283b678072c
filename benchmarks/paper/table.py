"""Markdown tables from the lines of results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

from benchmarks.rig.lines import (
    Line,
    averages,
    chosen,
    groups,
    markdown,
    mean_and_spread,
    ranks,
    scores,
    tasks_of,
    told,
)

# Columns of costs: of one run, or of one adapter.
COSTS: dict[str, Callable[[Line], float]] = {
    "trained": lambda line: line["trained"],
    "stored KiB": lambda line: line["stored_bytes"] / 1024,
    "selection s": lambda line: line["seconds"]["selection"],
    "training s": lambda line: line["seconds"]["training"],
    "step ms": lambda line: 1000 * line["seconds"]["training"] / max(line["steps"], 1),
    "peak MiB": lambda line: line["peak_bytes"] / 2**20,
}


def main_table(lines: Iterable[Line], split: str = "test") -> str:
    """The paper's Tables 1 and 2, and what the methods cost; the best average first.

    A task's cell is the mean over seeds ± their standard deviation, and the rank among the methods; a cell with fewer
    seeds than others says how many. `average` is the mean of the means, `spread` of the deviations, of methods that
    have all tasks. Costs are means over tasks of medians over seeds, without the head; `lr` is what the search chose,
    in the order of the tasks where it differs.
    """
    lines = list(lines)
    of, values = chosen(lines), scores(lines, split)
    tasks, methods = tasks_of(values), list(dict.fromkeys(method for method, _ in values))
    average = averages(values)
    rank = {
        task: ranks({m: statistics.mean(values[m, task]) for m in methods if (m, task) in values}) for task in tasks
    }
    average_rank = ranks({method: mean for method, (mean, _) in average.items()})
    spread_rank = ranks({m: value for m, (_, value) in average.items() if value is not None}, largest_first=False)
    most = max(map(len, values.values()))

    def score(method: str, task: str) -> str:
        if (method, task) not in values:
            return "–"
        here = values[method, task]
        few = f", {len(here)} of {most} seeds" * (len(here) < most)
        return f"{mean_and_spread(here)} ({rank[task][method]:g}){few}"

    def both(method: str) -> list[str]:
        if method not in average:
            return ["–", "–"]
        mean, deviation = average[method]
        last = "–" if deviation is None else f"{deviation:.1f} ({spread_rank[method]:g})"
        return [f"{mean:.1f} ({average_rank[method]:g})", last]

    def costs(method: str) -> list[str]:
        mine = [of[method, task] for task in tasks if (method, task) in of]
        means = [statistics.mean(statistics.median(map(cost, here)) for here in mine) for cost in COSTS.values()]
        rates = [f"{here[0]['config']['lr']:g}" for here in mine]
        return [*(f"{mean:,.0f}" if mean >= 10 else f"{mean:.2g}" for mean in means), " ".join(dict.fromkeys(rates))]

    rows = [
        [method, *(score(method, task) for task in tasks), *both(method), *costs(method)]
        for method in sorted(methods, key=lambda method: -average.get(method, (-math.inf, None))[0])
    ]
    return markdown(["method", *tasks, "average", "spread", *COSTS, "lr"], rows)


def report(lines: Iterable[Line], split: str = "test") -> str:
    """One table for each configuration in which methods can be compared, or for each if there is none.

    The densities of one method are compared by the figure of the sweep.
    """
    every = groups(lines)
    shown = {common: of for common, of in every.items() if len({m for m, _ in chosen(of)}) > 1} or every
    sections = []
    for common, of in shown.items():
        drop = dict(common)["drop"]
        title = f"Data perturbation: each seed trains without another {100 * drop:g} % of the rows"
        sections.append(f"### {title if drop else 'Main table'}\n\n{told(common)}\n\n{main_table(of, split)}")
    left = len(every) - len(shown)
    if left:
        sections.append(f"Not shown: {left} configurations with one method; see the figures.")
    return "\n\n".join(sections) if sections else "There are no results."
