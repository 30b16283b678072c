"""Markdown tables from the lines of results alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.paper.tasks import TASKS

Line = Mapping[str, Any]
# What lines of one table have in common: everything but what its rows, columns and seeds are.
VARIED = ("method", "task", "seed", "lr", "steps", "eval_every")


def groups(lines: Iterable[Line]) -> dict[tuple[tuple[str, Any], ...], list[Line]]:
    """Lines that belong into one table: those whose configuration is the same but for VARIED."""
    found: dict[tuple[tuple[str, Any], ...], list[Line]] = defaultdict(list)
    for line in lines:
        found[tuple((key, value) for key, value in line["config"].items() if key not in VARIED)].append(line)
    return dict(found)


def headline(scores: Mapping[str, float]) -> float:
    """The paper's metric of a task, in per cent; of a run without any model worth keeping 0."""
    return 100 * next(iter(scores.values()), 0.0)


def chosen(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    """(method, task) → its lines at one learning rate: that with the most seeds, then the best on validation.

    After an equal search all seeds but one have the learning rate that won on validation, and no other has two.
    """
    by_rate: dict[tuple[str, str], dict[float, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        config = line["config"]
        by_rate[config["method"], config["task"]][config["lr"]].append(line)
    return {where: max(rates.values(), key=_worth) for where, rates in by_rate.items()}


def _worth(lines: list[Line]) -> tuple[int, float, float]:
    return (
        len(lines),
        statistics.mean(headline(line["val"]) for line in lines),
        -statistics.mean(line["loss"]["val"] for line in lines),
    )


def spread(values: list[float]) -> float:
    """Standard deviation over seeds, with n − 1; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ranks(means: Mapping[str, float]) -> dict[str, float]:
    """1 for the largest; equals share the mean of their ranks."""
    places = rankdata([-value for value in means.values()])
    return dict(zip(means, places.tolist(), strict=True))


def main_table(lines: Iterable[Line], split: str = "test", spreads: bool = True) -> str:
    """Mean ± standard deviation over seeds and the rank in each column; average of the means and of the ranks."""
    cells = chosen(lines)
    tasks = [task for task in TASKS if any(there == task for _, there in cells)]
    methods = list(dict.fromkeys(method for method, _ in cells))
    values = {where: [headline(line[split]) for line in of] for where, of in cells.items()}
    means = {where: statistics.mean(of) for where, of in values.items()}
    rank = {task: ranks({m: means[m, task] for m in methods if (m, task) in means}) for task in tasks}
    whole = [method for method in methods if all((method, task) in means for task in tasks)]
    average = {method: statistics.mean(means[method, task] for task in tasks) for method in whole}
    average_rank = ranks(average)

    def cell(method: str, task: str) -> str:
        if (method, task) not in means:
            return "–"
        of = values[method, task]
        plus_minus = f" ± {spread(of):.1f}" if spreads else ""
        return f"{means[method, task]:.1f}{plus_minus} ({rank[task][method]:g})"

    rows = []
    for method in sorted(methods, key=lambda method: -average.get(method, -np.inf)):
        last = f"{average[method]:.1f} ({average_rank[method]:g})" if method in average else "–"
        rows.append([method, *(cell(method, task) for task in tasks), last])
    return markdown(["method", *tasks, "average"], rows)


def cost_table(lines: Iterable[Line]) -> str:
    """What a method costs on each task: medians over the lines."""
    of: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        of[line["config"]["task"], line["config"]["method"]].append(line)

    def median(of: list[Line], value: Callable[[Line], float]) -> float:
        return statistics.median(map(value, of))

    rows = []
    for (task, method), those in of.items():
        rows.append(
            [
                task,
                method,
                f"{median(those, lambda line: line['trained']):,.0f}",
                f"{median(those, lambda line: line['stored_bytes']) / 1024:,.0f}",
                f"{median(those, lambda line: line['seconds']['selection']):.1f}",
                f"{1000 * median(those, lambda line: line['seconds']['training'] / max(line['steps'], 1)):.0f}",
                f"{median(those, lambda line: line['peak_bytes']) / 2**20:,.0f}",
                ", ".join(f"{lr:g}" for lr in sorted({line["config"]["lr"] for line in chosen(those)[method, task]})),
            ]
        )
    head = ["task", "method", "trained", "stored KiB", "selection s", "step ms", "peak MiB", "lr"]
    return markdown(head, sorted(rows, key=lambda row: TASKS.index(row[0])))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table: the first column at the left, the others at the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(lines: Iterable[Line]) -> str:
    """All tables, one section for each configuration."""
    sections = []
    for common, of in groups(lines).items():
        told = ", ".join(f"{key} {value}" for key, value in common if value is not None)
        sections.append(f"{told}\n\n{main_table(of)}\n\n{cost_table(of)}")
    return "\n\n".join(sections)
