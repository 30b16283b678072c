"""Methods beside one another, from given lines."""

from __future__ import annotations

from benchmarks.rig.compare import compare
from tests.benchmarks.lines import line


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
