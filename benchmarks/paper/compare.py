"""Methods beside one another on the same seeds, from the lines of results alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from scipy.stats import ttest_rel

from benchmarks.paper.lines import Common, Line, chosen, headline, spread, told
from benchmarks.paper.table import markdown

HEAD = ["method", "lr", "trained", "seeds", "score", "shared", "difference", "p"]
# What methods that are compared may differ in.
COMPARED = ("method", "seed", "lr")


def compare(lines: Iterable[Line], methods: Sequence[str], split: str = "test", seeds: Collection[int] = ()) -> str:
    """The first of `methods` against the others, one table for each configuration in which it and others were run.

    A score is the mean ± standard deviation over a method's seeds; the difference that of first − other over the seeds
    which both have; p is of the paired t test, two-sided: the chance of a mean difference as large or larger between
    equal methods.

    Args:
        methods: as they were run, with all options (`Spec.text`).
        seeds: those to compare on, of all that there are; the learning rate is the one that all runs chose.
    """
    groups: dict[Common, list[Line]] = defaultdict(list)
    for line in lines:
        groups[tuple((key, value) for key, value in line["config"].items() if key not in COMPARED)].append(line)
    sections = []
    for common, of in groups.items():
        runs = {name: _by_seed([line for line in of if line["config"]["method"] == name], seeds) for name in methods}
        rows = [_row(name, runs[methods[0]], by_seed, split) for name, by_seed in runs.items() if by_seed]
        if runs[methods[0]] and len(rows) > 1:
            sections.append(f"{told(common)}\n\n{markdown(HEAD, rows)}")
    return "\n\n".join(sections) if sections else f"Nothing was run with {methods[0]} and another of these alike."


def _by_seed(lines: Iterable[Line], seeds: Collection[int]) -> dict[int, Line]:
    of = [line for lines in chosen(lines).values() for line in lines]
    return {line["config"]["seed"]: line for line in of if not seeds or line["config"]["seed"] in seeds}


def _row(name: str, first: dict[int, Line], mine: dict[int, Line], split: str) -> list[str]:
    one = next(iter(mine.values()))
    pairs = [(headline(first[seed][split]), headline(mine[seed][split])) for seed in first.keys() & mine.keys()]
    differences = [a - b for a, b in pairs]
    p = f"{ttest_rel(*zip(*pairs, strict=True)).pvalue:.2g}" if spread(differences) else "–"
    score = _mean([headline(line[split]) for line in mine.values()])
    difference = "–" if mine is first or not pairs else _mean(differences)
    about = [name, f"{one['config']['lr']:g}", f"{one['trained']:,}", str(len(mine))]
    return [*about, score, str(len(pairs)), difference, p]


def _mean(values: list[float]) -> str:
    deviation = spread(values)
    return f"{statistics.mean(values):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
