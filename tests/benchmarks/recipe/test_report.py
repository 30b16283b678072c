"""The recipe's tables, from given lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipe.plots import draw
from benchmarks.recipe.report import Entrant, ahead, estimate, fresh, report, rival


def line(method: str, seed: int, lr: float, test: float, val: float = -3.0, trained: int = 100) -> dict[str, Any]:
    return {
        "config": {
            "model": "tiny",
            "task": "docs",
            "method": method,
            "seed": seed,
            "lr": lr,
            "steps": 9,
            "eval_every": 9,
        },
        "val": {"documentation": val},
        "test": {"documentation": -test, "other": -2 * test},
        "loss": {"val": -val},
        "trained": trained,
        "cpu": {"selection": 10.0, "training": 30.0, "validation": 99.0},
    }


LINES = [
    line("lora:r=2", 0, 0.1, 1.0, val=-2.5),  # the grid's seed is not counted, and its best test not looked at
    line("lora:r=2", 0, 0.2, 9.0, val=-2.0),
    *(line("lora:r=2", seed, 0.2, test) for seed, test in ((1, 2.0), (2, 2.2), (3, 2.1))),
    line("random", 0, 0.3, 1.0),
    *(line("random", seed, 0.3, test, trained=101) for seed, test in ((1, 1.9), (2, 2.0), (4, 7.0))),
    *(line("lora:r=8", seed, 0.2, 1.0, trained=400) for seed in (1, 2)),
]
LORA, RANDOM = Entrant("lora:r=2"), Entrant("random")


def test_a_mean_has_the_standard_error_of_its_seeds() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.text(2) == "2.00 ± 0.58"
    assert estimate([1.5]).text(1) == "1.5"


def test_results_are_of_the_chosen_rate_and_of_other_seeds_than_chose_it() -> None:
    runs = fresh(LINES)
    assert {entrant.text: sorted(of) for entrant, of in runs.items()} == {
        "lora:r=2": [1, 2, 3],
        "random": [1, 2, 4],
        "lora:r=8": [1, 2],
    }
    assert {one["config"]["lr"] for one in runs[LORA].values()} == {0.2}


def test_a_rate_that_broke_is_not_the_best_one() -> None:
    broken = {**line("random", 1, 0.9, 1.0), "val": {}, "loss": {"val": math.inf}}
    assert [one["config"]["lr"] for one in fresh([broken, line("random", 1, 0.3, 2.0)])[RANDOM].values()] == [0.3]


def test_a_method_is_compared_seed_by_seed_with_the_lora_of_its_size() -> None:
    runs = fresh(LINES)
    assert [rival(entrant, runs) for entrant in runs] == [None, LORA, None]
    found = ahead(runs[RANDOM], runs[LORA])
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(0.15), 2)  # a smaller loss is ahead
    assert found.error == pytest.approx(0.05)
    assert ahead(runs[RANDOM], {9: LINES[0]}) is None


def test_the_table_has_results_differences_forgetting_and_work() -> None:
    told = report(LINES).splitlines()
    assert told[0] == "model tiny, task docs, steps 9"
    assert told[2:] == [
        "| method | lr | trained | seeds | test loss | ahead of LoRA | of LoRA in other steps "
        "| loss on other text | CPU s | of it before training |",
        "| --- |" + " ---: |" * 9,
        "| lora:r=2 | 0.2 | 100 | 3 | 2.100 ± 0.058 | – | – | 4.200 ± 0.115 | 40 | 10 |",
        "| random | 0.3 | 101 | 3 | 3.633 ± 1.684 | 0.150 ± 0.050 (2) | – | 7.267 ± 3.367 | 40 | 10 |",
        "| lora:r=8 | 0.2 | 400 | 2 | 1.000 ± 0.000 | – | – | 2.000 ± 0.000 | 40 | 10 |",
    ]
    assert report(LINES[:2]) == "There are no results of fresh seeds."


def test_there_is_no_figure_without_results(tmp_path: Path) -> None:
    assert draw(LINES[:2], tmp_path) == []
    assert [path.name for path in draw(LINES, tmp_path)] == ["size.svg", "work.svg"]


def test_of_loras_of_one_size_the_best_is_the_one_to_compare_with() -> None:
    other = [line("lora:alpha=9,r=2", seed, 0.2, 1.5) for seed in (1, 2)]
    for lines in ([*LINES, *other], [*other, *LINES]):
        assert rival(RANDOM, fresh(lines)) == Entrant("lora:alpha=9,r=2")


def test_a_warm_head_is_compared_with_a_warm_head() -> None:
    warm = [line(f"{name}:head_warmup=3", seed, 0.2, 1.0) for name in ("random", "lora") for seed in (1, 2)]
    runs = fresh([*LINES, *warm])
    found = [rival(entrant, runs) for entrant in (RANDOM, Entrant("random:head_warmup=3"))]
    assert found == [LORA, Entrant("lora:head_warmup=3")]


def test_another_number_of_steps_is_a_row_of_its_own_and_nobody_s_rival() -> None:
    longer = [line("lora:r=2", seed, 0.2, 1.2) for seed in (1, 2)] + [line("lora:r=2", 1, 0.2, 1.0)]
    for one, steps in zip(longer, (12, 12, 105), strict=True):
        one["config"] |= {"steps": steps, "eval_every": steps}
    told = report([*LINES, *longer])
    assert told.count("model tiny") == 1
    assert "| lora:r=2, steps 12 | 0.2 | 100 | 2 | 1.200 ± 0.000 | – |" in told
    assert "| 0.150 ± 0.050 (2) | 12: -0.750 ± 0.050 (2); 105: -0.900 (1) |" in told
