"""Tables of the recipe's results, from their lines alone: means and paired differences, each ± its standard error."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.recipe.beds import GRID_SEED
from benchmarks.rig.language import DOCS
from benchmarks.rig.lines import Common, Line, alike, chosen, headline, markdown, spread, told

# What the methods of one table may differ in. One with other numbers of steps is compared at equal work.
COMPARED = ("method", "seed", "lr", "steps", "eval_every")
# what parts a method's name from the number of its steps, where that is another than the bed's
OTHER_STEPS = ", steps "


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


def is_loss(line: Line) -> bool:
    """Whether smaller is better."""
    return line["config"]["task"] == DOCS


def fresh(lines: Iterable[Line], steps: int | None = None) -> dict[str, dict[int, Line]]:
    """Method → seed → its line at the learning rate that was chosen, without the seed that chose it.

    Args:
        steps: those of the bed; a method with others says how many it took.
    """
    found: dict[str, dict[int, Line]] = {}
    for method, of in _by_method(lines, steps).items():
        (best,) = chosen(of).values()
        seeds = {line["config"]["seed"]: line for line in best if line["config"]["seed"] != GRID_SEED}
        if seeds:
            found[method] = seeds
    return found


def _by_method(lines: Iterable[Line], steps: int | None) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        config = line["config"]
        other = f"{OTHER_STEPS}{config['steps']}" if steps not in (None, config["steps"]) else ""
        found.setdefault(config["method"] + other, []).append(line)
    return found


def rival(method: str, runs: dict[str, dict[int, Line]]) -> str | None:
    """Of the LoRAs whose size is nearest to a method's the best; none if it is one itself, or there is none.

    None either of another number of steps, nor for one; and with a warm head for what has one, too.
    """
    loras = [
        name for name in runs if name.startswith("lora") and OTHER_STEPS not in name and _warm(name) == _warm(method)
    ]
    if method.startswith("lora") or OTHER_STEPS in method or not loras:
        return None
    size = _any(runs[method])["trained"]
    worse = 1 if is_loss(_any(runs[method])) else -1

    def rank(name: str) -> tuple[int, float]:
        mean = statistics.fmean(quality(line) for line in runs[name].values())
        return abs(_any(runs[name])["trained"] - size), worse * mean

    return min(loras, key=rank)


def _warm(method: str) -> set[str]:
    """Whether, and for how many steps, the head is trained alone first."""
    return {part for part in method.partition(":")[2].split(",") if part.startswith("head_warmup")}


def ahead(mine: dict[int, Line], other: dict[int, Line]) -> Estimate | None:
    """By how much the first is better, on the seeds that both have; None if there are none."""
    shared = sorted(mine.keys() & other.keys())
    sign = -1 if is_loss(_any(mine)) else 1
    differences = [sign * (quality(mine[seed]) - quality(other[seed])) for seed in shared]
    return estimate(differences) if differences else None


def _any(lines: dict[int, Line]) -> Line:
    return next(iter(lines.values()))


def beds(lines: Iterable[Line]) -> dict[Common, dict[str, dict[int, Line]]]:
    """Configuration → method → seed → line, of all that have a result on a fresh seed."""
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


def _table(runs: dict[str, dict[int, Line]]) -> str:
    loss = is_loss(_any(_any_of(runs)))
    digits, sign = (3, 1) if loss else (1, -1)
    order = sorted(
        runs,
        key=lambda name: (
            _any(runs[rival(name, runs) or name])["trained"],
            sign * estimate([quality(line) for line in runs[name].values()]).mean,
        ),
    )
    head = ["method", "lr", "trained", "seeds", "test loss" if loss else "test"]
    head += ["ahead of LoRA", "of LoRA in other steps"]
    head += ["loss on other text"] * loss + ["CPU s", "of it before training"]
    return markdown(head, [_row(name, runs, digits, loss) for name in order])


def _any_of(runs: dict[str, dict[int, Line]]) -> dict[int, Line]:
    return next(iter(runs.values()))


def _row(name: str, runs: dict[str, dict[int, Line]], digits: int, loss: bool) -> list[str]:
    mine, other = runs[name], rival(name, runs)
    one, lines = _any(mine), list(mine.values())
    difference = ahead(mine, runs[other]) if other else None
    cells = [name, f"{one['config']['lr']:g}", f"{one['trained']:,}", str(len(lines))]
    cells.append(estimate([quality(line) for line in lines]).text(digits))
    cells.append("–" if difference is None else f"{difference.text(digits)} ({difference.seeds})")
    others = [of for of in runs if other and of.startswith(f"{other}{OTHER_STEPS}")]
    found = {of.rpartition(" ")[2]: ahead(mine, runs[of]) for of in others}
    texts = [f"{steps}: {of.text(digits)} ({of.seeds})" for steps, of in sorted(found.items()) if of]
    cells.append("; ".join(texts) or "–")
    if loss:
        cells.append(estimate([-line["test"]["other"] for line in lines]).text(digits))
    return [*cells, f"{work(lines):.0f}", f"{statistics.fmean(line['cpu']['selection'] for line in lines):.0f}"]


def work(lines: Iterable[Line]) -> float:
    """Mean CPU seconds of what makes the adapter: choosing, with rehearsal and warm-up, and training."""
    return statistics.fmean(line["cpu"]["selection"] + line["cpu"]["training"] for line in lines)
