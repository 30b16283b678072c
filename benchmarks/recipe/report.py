"""Tables of the recipe's results, from their lines alone: means and paired differences, each ± its standard error."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from benchmarks.recipe.beds import GRID_SEED
from benchmarks.rig.language import DOCS
from benchmarks.rig.lines import Common, Line, alike, chosen, headline, markdown, options_of, spread, told

T = TypeVar("T")
# What the methods of one table may differ in. One with other numbers of steps is compared at equal work.
COMPARED = ("method", "seed", "lr", "steps", "eval_every")


class Entrant(NamedTuple):
    """What one row of a table is of.

    Attributes:
        method: as `methods.Spec.text` writes it.
        other_steps: how many it took, where those are not the bed's; then it is compared at equal work.
    """

    method: str
    other_steps: int | None = None

    @property
    def text(self) -> str:
        """As it stands in a table."""
        return self.method if self.other_steps is None else f"{self.method}, steps {self.other_steps}"

    @property
    def kind(self) -> str:
        """The method's name, without its options."""
        return options_of(self.method)[0]

    @property
    def warmup(self) -> str | None:
        """For how many steps the head is trained alone first, as written."""
        return options_of(self.method)[1].get("head_warmup")


# entrant → seed → its line
Runs = dict[Entrant, dict[int, Line]]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its standard error; nan of a single seed."""

    mean: float
    error: float
    seeds: int

    def text(self, digits: int) -> str:
        """As it stands in a table."""
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, and the standard deviation (n − 1) over √n."""
    deviation = spread(list(values))
    error = math.nan if deviation is None else deviation / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, len(values))


def quality(line: Line) -> float:
    """A run's result on the test rows: a language model's loss in nats a token, else the metric in per cent."""
    return -line["test"]["documentation"] if is_loss(line) else headline(line["test"])


def result(runs: dict[int, Line]) -> Estimate:
    """The quality over seeds."""
    return estimate([quality(line) for line in runs.values()])


def is_loss(line: Line) -> bool:
    """Whether smaller is better."""
    return line["config"]["task"] == DOCS


def fresh(lines: Iterable[Line], steps: int | None = None) -> Runs:
    """Lines at the learning rate that was chosen, without the seed that chose it.

    Args:
        steps: those of the bed; None where all lines have the same.
    """
    every: dict[Entrant, list[Line]] = {}
    for line in lines:
        config = line["config"]
        other = None if steps in (None, config["steps"]) else config["steps"]
        every.setdefault(Entrant(config["method"], other), []).append(line)
    found: Runs = {}
    for entrant, of in every.items():
        (best,) = chosen(of).values()
        seeds = {line["config"]["seed"]: line for line in best if line["config"]["seed"] != GRID_SEED}
        if seeds:
            found[entrant] = seeds
    return found


def rival(entrant: Entrant, runs: Runs) -> Entrant | None:
    """Of the LoRAs whose size is nearest to an entrant's the best; none if it is one itself, or there is none.

    None either of another number of steps, nor for one; and with a warm head for what has one, too.
    """
    loras = [one for one in runs if one.kind == "lora" and not one.other_steps and one.warmup == entrant.warmup]
    if entrant.kind == "lora" or entrant.other_steps or not loras:
        return None
    size = _any(runs[entrant])["trained"]
    worse = 1 if is_loss(_any(runs[entrant])) else -1

    def rank(one: Entrant) -> tuple[int, float]:
        return abs(_any(runs[one])["trained"] - size), worse * result(runs[one]).mean

    return min(loras, key=rank)


def ahead(mine: dict[int, Line], other: dict[int, Line]) -> Estimate | None:
    """By how much the first is better, on the seeds that both have; None if there are none."""
    shared = sorted(mine.keys() & other.keys())
    sign = -1 if is_loss(_any(mine)) else 1
    differences = [sign * (quality(mine[seed]) - quality(other[seed])) for seed in shared]
    return estimate(differences) if differences else None


def _any(found: dict[Any, T]) -> T:
    return next(iter(found.values()))


def beds(lines: Iterable[Line]) -> dict[Common, Runs]:
    """Configuration → its runs, of all that have a result on a fresh seed; most of a bed's lines have its steps."""
    found = {}
    for common, of in alike(lines, COMPARED).items():
        ((steps, _),) = Counter(line["config"]["steps"] for line in of).most_common(1)
        if runs := fresh(of, steps):
            found[(*common, ("steps", steps))] = runs
    return found


def report(lines: Iterable[Line]) -> str:
    """One table for each test bed: the sizes in their order, the best of each first."""
    sections = [f"{told(common)}\n\n{_table(runs)}" for common, runs in beds(lines).items()]
    return "\n\n".join(sections) if sections else "There are no results of fresh seeds."


def _table(runs: Runs) -> str:
    loss = is_loss(_any(_any(runs)))
    digits, sign = (3, 1) if loss else (1, -1)

    def place(entrant: Entrant) -> tuple[int, float]:
        return _any(runs[rival(entrant, runs) or entrant])["trained"], sign * result(runs[entrant]).mean

    head = ["method", "lr", "trained", "seeds", "test loss" if loss else "test"]
    head += ["ahead of LoRA", "of LoRA in other steps"]
    head += ["loss on other text"] * loss + ["CPU s", "of it before training"]
    return markdown(head, [_row(entrant, runs, digits, loss) for entrant in sorted(runs, key=place)])


def _row(entrant: Entrant, runs: Runs, digits: int, loss: bool) -> list[str]:
    mine, other = runs[entrant], rival(entrant, runs)
    one, lines = _any(mine), list(mine.values())
    difference = ahead(mine, runs[other]) if other else None
    cells = [entrant.text, f"{one['config']['lr']:g}", f"{one['trained']:,}", str(len(lines))]
    cells.append(result(mine).text(digits))
    cells.append("–" if difference is None else f"{difference.text(digits)} ({difference.seeds})")
    longer = {of.other_steps: runs[of] for of in runs if other and of.method == other.method and of.other_steps}
    found = {steps: ahead(mine, longer[steps]) for steps in sorted(longer)}
    cells.append("; ".join(f"{steps}: {of.text(digits)} ({of.seeds})" for steps, of in found.items() if of) or "–")
    if loss:
        cells.append(estimate([-line["test"]["other"] for line in lines]).text(digits))
    return [*cells, f"{work(lines):.0f}", f"{statistics.fmean(line['cpu']['selection'] for line in lines):.0f}"]


def work(lines: Iterable[Line]) -> float:
    """Mean CPU seconds of what makes the adapter: choosing, with rehearsal and warm-up, and training."""
    return statistics.fmean(line["cpu"]["selection"] + line["cpu"]["training"] for line in lines)
