"""What the lines of results say: which belong together, and numbers over their seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Any

from scipy.stats import rankdata

from benchmarks.rig.tasks import TASKS

Line = Mapping[str, Any]
Common = tuple[tuple[str, Any], ...]
# What lines of one table have in common: everything but what its rows, columns and seeds are.
VARIED = ("method", "task", "seed", "lr", "steps", "eval_every")


def options_of(method: str) -> tuple[str, dict[str, str]]:
    """Name and options of a method, as written, even of one that is gone."""
    name, _, rest = method.partition(":")
    return name, dict(part.split("=", 1) for part in filter(None, rest.split(",")))


def method_of(line: Line) -> str:
    """A line's method, its density left out."""
    name, options = options_of(line["config"]["method"])
    rest = ",".join(f"{key}={value}" for key, value in options.items() if key != "density")
    return name + ":" * bool(rest) + rest


def density_of(line: Line) -> float:
    """A line's density: of its method, else of the run."""
    return float(options_of(line["config"]["method"])[1].get("density", line["config"]["density"]))


def alike(
    lines: Iterable[Line], apart: Collection[str], config_of: Callable[[Line], Mapping[str, Any]] = itemgetter("config")
) -> dict[Common, list[Line]]:
    """Lines by their configuration, but for `apart`; what is None is not told."""
    found: dict[Common, list[Line]] = defaultdict(list)
    for line in lines:
        told = ((key, value) for key, value in config_of(line).items() if key not in apart and value is not None)
        found[tuple(told)].append(line)
    return dict(found)


def groups(lines: Iterable[Line], apart: tuple[str, ...] = ()) -> dict[Common, list[Line]]:
    """Lines by their configuration, but for VARIED and `apart`, and with the density that they have."""
    return alike(lines, (*VARIED, *apart), lambda line: {**line["config"], "density": density_of(line)})


def told(common: Common) -> str:
    """What lines have in common, as text."""
    return ", ".join(f"{key} {value}" for key, value in common)


def headline(scores: Mapping[str, float]) -> float:
    """The paper's metric of a task, in per cent; of a run without any model worth keeping 0."""
    return 100 * next(iter(scores.values()), 0.0)


def chosen(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    """(method, task) → its lines at one learning rate and length: those of the most seeds, then the best on validation.

    After an equal search all seeds but one have the learning rate that won on validation, and no other has two.
    """
    by_rate: dict[tuple[str, str], dict[tuple[float, int, int], list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        config = line["config"]
        by_rate[method_of(line), config["task"]][config["lr"], config["steps"], config["eval_every"]].append(line)
    return {where: max(rates.values(), key=_worth) for where, rates in by_rate.items()}


def _worth(lines: list[Line]) -> tuple[int, float, float]:
    return (
        len(lines),
        statistics.mean(headline(line["val"]) if line["val"] else -math.inf for line in lines),
        -statistics.mean(line["loss"]["val"] for line in lines),
    )


def scores(lines: Iterable[Line], split: str = "test") -> dict[tuple[str, str], list[float]]:
    """(method, task) → the paper's metric of each seed."""
    return {where: [headline(line[split]) for line in of] for where, of in chosen(lines).items()}


def tasks_of(cells: Iterable[tuple[str, str]]) -> list[str]:
    """The tasks of (method, task), in the paper's order."""
    there = {task for _, task in cells}
    return [task for task in TASKS if task in there]


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds, with n − 1; of one there is none."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation, as text."""
    deviation = spread(values)
    return f"{statistics.mean(values):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def averages(values: Mapping[tuple[str, str], list[float]]) -> dict[str, tuple[float, float | None]]:
    """Method → mean over tasks of its means and of its standard deviations, if it has all tasks (and two seeds)."""
    tasks, found = tasks_of(values), {}
    for method in dict.fromkeys(method for method, _ in values):
        if all((method, task) in values for task in tasks):
            spreads = [spread(values[method, task]) for task in tasks]
            both = [value for value in spreads if value is not None]
            mean = statistics.mean(statistics.mean(values[method, task]) for task in tasks)
            found[method] = (mean, statistics.mean(both) if len(both) == len(tasks) else None)
    return found


def ranks(means: Mapping[str, float], largest_first: bool = True) -> dict[str, float]:
    """1 for the best; equals, up to rounding of their sums, share the mean of their ranks."""
    places = rankdata([round(-value if largest_first else value, 6) for value in means.values()])
    return dict(zip(means, places.tolist(), strict=True))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table: the first column at the left, the others at the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
