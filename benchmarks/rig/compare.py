"""Methods beside one another on the same seeds, from the lines of results alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from scipy.stats import ttest_rel

from benchmarks.rig.lines import Line, alike, chosen, headline, markdown, mean_and_spread, spread, told

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
    sections = []
    for common, of in alike(lines, COMPARED).items():
        runs = {name: _by_seed([line for line in of if line["config"]["method"] == name], seeds) for name in methods}
        rows = [_row(name, runs[methods[0]], by_seed, split) for name, by_seed in runs.items() if by_seed]
        if runs[methods[0]] and len(rows) > 1:
            sections.append(f"{told(common)}\n\n{markdown(HEAD, rows)}")
    return "\n\n".join(sections) if sections else f"Nothing was run with {methods[0]} and another of these alike."


def _by_seed(lines: Iterable[Line], seeds: Collection[int]) -> dict[int, Line]:
    of = next(iter(chosen(lines).values()), [])  # one method, one task
    return {line["config"]["seed"]: line for line in of if not seeds or line["config"]["seed"] in seeds}


def _row(name: str, first: dict[int, Line], mine: dict[int, Line], split: str) -> list[str]:
    one = next(iter(mine.values()))
    pairs = [(headline(first[seed][split]), headline(mine[seed][split])) for seed in first.keys() & mine.keys()]
    differences = [a - b for a, b in pairs]
    p = f"{ttest_rel(*zip(*pairs, strict=True)).pvalue:.2g}" if spread(differences) else "–"
    score = mean_and_spread([headline(line[split]) for line in mine.values()])
    difference = "–" if mine is first or not pairs else mean_and_spread(differences)
    about = [name, f"{one['config']['lr']:g}", f"{one['trained']:,}", str(len(mine))]
    return [*about, score, str(len(pairs)), difference, p]
