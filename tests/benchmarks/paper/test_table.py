"""The paper's tables, from given lines."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.paper.table import main_table, report
from benchmarks.rig.compare import compare
from benchmarks.rig.lines import averages, chosen, density_of, method_of, ranks, scores
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


def test_the_learning_rate_in_the_table_is_the_one_that_the_other_seeds_used() -> None:
    assert {line["config"]["lr"] for line in chosen(LINES)["full", "rte"]} == {0.1}
    one_seed = [line("sam", "cb", 0, 0.1, 0.5, 0.9), line("sam", "cb", 0, 0.2, 0.6, 0.1)]
    assert [line["config"]["lr"] for line in chosen(one_seed)["sam", "cb"]] == [0.2]


def test_a_seed_does_not_count_twice_where_runs_have_two_lengths() -> None:
    longer = [line("lora", "cb", 0, 0.3, 0.6, 0.8, steps=20)]
    assert scores([*LINES, *longer])["lora", "cb"] == [80.0]
    assert scores([*LINES, *longer])["full", "cb"] == [50.0, 70.0]


def test_equals_share_their_ranks() -> None:
    assert ranks({"a": 1.0, "b": 3.0, "c": 3.0, "d": 2.0}) == {"a": 4, "b": 1.5, "c": 1.5, "d": 3}
    assert ranks({"a": 1.0, "b": 3.0}, largest_first=False) == {"a": 1, "b": 2}
    assert ranks({"a": 0.1 + 0.2, "b": 0.3}) == {"a": 1.5, "b": 1.5}


def test_a_spread_needs_two_seeds_on_every_task() -> None:
    one = line("lora", "rte", 0, 0.3, 0.5, 0.3)
    assert averages(scores([*LINES, one]))["lora"] == (40.0, None)
    assert averages(scores(LINES))["sam"] == (42.5, 0.0)


def test_a_method_s_own_density_goes_before_the_run_s_and_is_no_part_of_its_name() -> None:
    own = line("sam:budget=tensor,density=0.02", "cb", 0, 0.1, 0.5, 0.5)
    assert (method_of(own), density_of(own)) == ("sam:budget=tensor", 0.02)
    assert (method_of(LINES[0]), density_of(LINES[0])) == ("full", 0.005)


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


def test_methods_are_compared_on_the_seeds_that_both_have_at_the_rates_that_all_runs_chose() -> None:
    lines = [line("sam:density=0.02", "cb", seed, 0.1, 0.5, test) for seed, test in enumerate((0.5, 0.6, 0.8, 0.1))]
    lines += [line("lora", "cb", seed, 0.3, 0.6, test) for seed, test in enumerate((0.49, 0.58, 0.77))]
    lines += [line("lora", "cb", 0, 0.2, 0.5, 0.99), line("sam:density=0.02", "cb", 0, 0.1, 0.5, 0.5, drop=0.1)]
    lines += [line("full", "cb", 3, 0.3, 0.5, 0.2), line("full", "rte", 3, 0.3, 0.5, 0.2)]
    table = compare(lines, ["sam:density=0.02", "lora", "full", "head"]).splitlines()
    # differences of 1, 2 and 3 points: t = 2 / (1 / √3) with two degrees of freedom
    assert table[2:] == [
        "| method | lr | trained | seeds | score | shared | difference | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| sam:density=0.02 | 0.1 | 1,234 | 4 | 50.0 ± 29.4 | 4 | – | – |",
        "| lora | 0.3 | 1,234 | 3 | 61.3 ± 14.3 | 3 | 2.0 ± 1.0 | 0.074 |",
        "| full | 0.3 | 1,234 | 1 | 20.0 | 1 | -10.0 | – |",
    ]
    fresh = compare(lines, ["sam:density=0.02", "lora"], seeds=[2]).splitlines()
    assert fresh[-1] == "| lora | 0.3 | 1,234 | 1 | 77.0 | 1 | 3.0 | – |"
    assert "Nothing was run with head" in compare(lines, ["head", "lora"])
