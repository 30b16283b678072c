"""The paper's tables, from given lines."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks.paper.table import chosen, cost_table, main_table, ranks, report


def line(method: str, task: str, seed: int, lr: float, val: float, test: float, **config: Any) -> dict[str, Any]:
    return {
        "config": {"method": method, "task": task, "seed": seed, "lr": lr, "steps": 10, "eval_every": 5, **config},
        "val": {"accuracy": val},
        "test": {"accuracy": test},
        "loss": {"val": 1.0},
        "trained": 1234,
        "stored_bytes": 2048,
        "seconds": {"selection": 1.5, "training": 2.0},
        "steps": 8,
        "peak_bytes": 3 * 2**20,
    }


LINES = [
    line("full", "rte", 0, 0.1, 0.9, 0.1),  # the grid: the best test is not the best validation
    line("full", "rte", 0, 0.2, 0.8, 0.99),
    line("full", "rte", 1, 0.1, 0.2, 0.3),
    line("full", "cb", 0, 0.2, 0.5, 0.5),
    line("full", "cb", 1, 0.2, 0.5, 0.7),
    line("sam", "rte", 0, 0.3, 0.5, 0.2),
    line("sam", "rte", 1, 0.3, 0.5, 0.2),
    line("sam", "cb", 0, 0.3, 0.5, 0.65),
    line("sam", "cb", 1, 0.3, 0.5, 0.65),
    line("lora", "cb", 0, 0.3, 0.5, 0.5),
]


def test_the_main_table_has_means_deviations_ranks_and_averages() -> None:
    # rte: full 10 and 30, sam 20 and 20; cb: full 50 and 70, sam 65 and 65, lora 50
    deviation = statistics.stdev([10, 30])
    assert main_table(LINES).splitlines() == [
        "| method | rte | cb | average |",
        "| --- | ---: | ---: | ---: |",
        "| sam | 20.0 ± 0.0 (1.5) | 65.0 ± 0.0 (1) | 42.5 (1) |",
        f"| full | 20.0 ± {deviation:.1f} (1.5) | 60.0 ± {deviation:.1f} (2) | 40.0 (2) |",
        "| lora | – | 50.0 ± 0.0 (3) | – |",
    ]


def test_the_learning_rate_in_the_table_is_the_one_that_the_other_seeds_used() -> None:
    assert {line["config"]["lr"] for line in chosen(LINES)["full", "rte"]} == {0.1}
    one_seed = [line("sam", "cb", 0, 0.1, 0.5, 0.9), line("sam", "cb", 0, 0.2, 0.6, 0.1)]
    assert [line["config"]["lr"] for line in chosen(one_seed)["sam", "cb"]] == [0.2]


def test_equals_share_their_ranks() -> None:
    assert ranks({"a": 1.0, "b": 3.0, "c": 3.0, "d": 2.0}) == {"a": 4, "b": 1.5, "c": 1.5, "d": 3}


def test_the_cost_table_has_medians_and_the_learning_rate() -> None:
    assert cost_table(LINES[-1:]).splitlines()[-1] == "| cb | lora | 1,234 | 2 | 1.5 | 250 | 3 | 0.3 |"


@pytest.mark.parametrize("varied", ["density", "drop"])
def test_lines_of_different_configurations_are_in_different_tables(varied: str) -> None:
    lines = [line("sam", "cb", 0, 0.1, 0.5, value, **{varied: value}) for value in (0.1, 0.2)]
    found = report(lines)
    assert f"{varied} 0.1\n\n| method | cb | average |" in found
    assert f"{varied} 0.2\n\n| method | cb | average |" in found
    assert "| sam | 10.0 ± 0.0 (1) | 10.0 (1) |" in found
