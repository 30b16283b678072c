"""The paper's tables, from given lines."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.paper.table import main_table, report
from tests.benchmarks.lines import LINES, line

COSTS = "| 1,234 | 2 | 1.5 | 2 | 250 | 3 |"


def test_the_main_table_has_means_deviations_ranks_averages_costs_and_rates() -> None:
    # rte: full 10 and 30, sam 20 and 20; cb: full 50 and 70, sam 65 and 65, lora 50
    deviation = statistics.stdev([10, 30])
    assert main_table(LINES).splitlines() == [
        "| method | rte | cb | average | spread "
        "| trained | stored KiB | selection s | training s | step ms | peak MiB | lr |",
        "| --- |" + " ---: |" * 11,
        f"| sam | 20.0 ± 0.0 (1.5) | 65.0 ± 0.0 (1) | 42.5 (1) | 0.0 (1) {COSTS} 0.3 |",
        f"| full | 20.0 ± {deviation:.1f} (1.5) | 60.0 ± {deviation:.1f} (2) | 40.0 (2) | {deviation:.1f} (2) {COSTS} "
        "0.1 0.2 |",
        f"| lora | – | 50.0 (3), 1 of 2 seeds | – | – {COSTS} 0.3 |",
    ]


def test_the_table_of_the_validation_split_has_other_scores_of_the_same_runs() -> None:
    assert "| full | 55.0 ± 49.5 (1) | 50.0 ± 0.0 (2) | 52.5 (1) |" in main_table(LINES, "val")


@pytest.mark.parametrize(
    "other", [{"drop": 0.1}, {"density": 0.2}, {"dropout": 0.0}, {"method": "density=0.2"}], ids=str
)
def test_lines_of_different_configurations_are_in_different_tables(other: dict[str, float]) -> None:
    option = f":{other.pop('method')}" if "method" in other else ""
    lines = [line(name, "cb", 0, 0.1, 0.5, value) for name, value in (("sam", 0.1), ("lora", 0.2))]
    lines += [line(f"{name}{option}", "cb", 0, 0.1, 0.5, v, **other) for name, v in (("sam", 0.3), ("lora", 0.4))]
    first, second = report(lines).split("### ")[1:]
    assert "| sam | 10.0 (2) |" in first
    assert "| sam | 30.0 (2) |" in second
    assert first.startswith("Main table")
    assert second.startswith("Data perturbation" if "drop" in other else "Main table")
    assert "density 0.2" in second if option or "density" in other else "density 0.005" in second


def test_a_configuration_with_one_method_is_shown_only_where_there_is_nothing_to_compare() -> None:
    lone = line("sam:density=0.1", "cb", 0, 0.1, 0.5, 0.123)
    assert "| sam | 12.3 (1) |" in report([lone])
    both = report([*LINES, lone])
    assert "12.3" not in both
    assert both.endswith("Not shown: 1 configurations with one method; see the figures.")
    assert report([]) == "There are no results."
