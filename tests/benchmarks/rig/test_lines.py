"""What given lines say."""

from __future__ import annotations

from benchmarks.rig.lines import averages, chosen, density_of, method_of, ranks, scores
from tests.benchmarks.lines import LINES, line


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
