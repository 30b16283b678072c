"""The paper's figures, from given lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

from benchmarks.paper.plots import curves, draw, draw_discontinuity, draw_sweep, relation, running_mean, sweep
from tests.benchmarks.lines import LINES, line

SWEEP = [
    line(method, task, seed, 0.1, 0.6, value + 0.1 * seed)
    for task in ("rte", "cb")
    for method, value in (("sam:density=0.001", 0.5), ("sam", 0.6), ("sam:density=0.1", 0.4), ("lora", 0.3))
    for seed in (0, 1)
]


def relate(scores: dict[str, tuple[float, float]]) -> list[dict[str, object]]:
    return [line(method, "cb", seed, 0.1, 0.5, both[seed]) for method, both in scores.items() for seed in (0, 1)]


def test_a_sweep_has_the_methods_with_two_densities_in_their_order() -> None:
    found = sweep(SWEEP, "test")
    assert set(found) == {("sam", "rte"), ("sam", "cb")}
    for where, points in found.items():
        assert [density for density, _ in points] == [0.001, 0.005, 0.1], where
        assert [values for _, values in points] == [[50.0, 60.0], [60.0, 70.0], [40.0, 50.0]]
    assert sweep(SWEEP, "train")["sam", "cb"][0] == (0.001, [30.0, 30.0])


def test_the_sweep_s_figure_shows_means_and_deviations_of_both_splits() -> None:
    figure = draw_sweep([*SWEEP, line("sam:density=0.2", "cb", 0, 0.1, 0.6, 0.9)])
    panels = [[axis.lines[0].get_xydata().tolist() for axis in row] for row in np.reshape(figure.axes, (2, 4))]
    plt.close(figure)
    (rte, cb), deviation = panels, np.std([0, 10], ddof=1)
    assert rte[0] == [[0.001, 55.0], [0.005, 65.0], [0.1, 45.0]]
    assert cb[0] == [*rte[0], [0.2, 90.0]]
    assert cb[1] == [[density, pytest.approx(deviation)] for density in (0.001, 0.005, 0.1)]  # not of one seed
    assert cb[2] == [[density, 30.0] for density in (0.001, 0.005, 0.1, 0.2)]
    assert cb[3] == [[density, 0.0] for density in (0.001, 0.005, 0.1)]


def test_the_relation_ranks_the_methods_and_correlates_the_ranks() -> None:
    found = relation(relate({"a": (0.9, 0.9), "b": (0.6, 0.8), "c": (0.2, 0.6), "d": (0.5, 0.6)}))
    assert found is not None
    assert found.stability == {"a": 1, "b": 3, "c": 4, "d": 2}
    assert found.performance == {"a": 1, "b": 2, "c": 4, "d": 3}
    expected = spearmanr([0, 0.2, 0.4, 0.1], [-0.9, -0.7, -0.4, -0.55])
    assert (found.rho, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.rho == pytest.approx(0.8)


@pytest.mark.parametrize(
    "scores",
    [
        {"a": (0.9, 0.9), "b": (0.6, 0.8), "c": (0.2, 0.6)},
        {"a": (0.9, 0.9), "b": (0.6, 0.6), "c": (0.3, 0.3), "d": (0.1, 0.1)},
        {"a": (0.4, 0.6), "b": (0.3, 0.7), "c": (0.5, 0.5), "d": (0.2, 0.8)},
    ],
    ids=["three methods", "the same spread", "the same score"],
)
def test_there_is_no_relation_where_nothing_can_be_ranked(scores: dict[str, tuple[float, float]]) -> None:
    assert relation(relate(scores)) is None


def test_the_curves_are_of_the_chosen_rate_and_the_first_seed() -> None:
    lines = [
        {**line("sam", "cb", 1, 0.1, 0.5, 0.5), "curve": [1.0]},
        {**line("sam", "cb", 0, 0.1, 0.4, 0.5), "curve": [2.0]},
        {**line("sam", "cb", 0, 0.2, 0.9, 0.5), "curve": [3.0]},
        line("lora", "cb", 0, 0.1, 0.5, 0.5),
    ]
    assert {where: line["curve"] for where, line in curves(lines).items()} == {("cb", "sam"): [2.0]}


def test_a_running_mean_looks_back_only() -> None:
    assert running_mean([2.0, 4.0, 6.0, 100.0], 2).tolist() == [2.0, 3.0, 5.0, 53.0]


def test_the_steps_of_a_projection_are_marked() -> None:
    method = "diffpruning:burn_in=1,project_every=3"
    lines = [{**line(name, "cb", 0, 0.1, 0.5, 0.5), "curve": [1.0] * 8} for name in (method, "sam")]
    figure = draw_discontinuity(lines)
    dotted = [float(one.get_xdata()[0]) for one in figure.axes[0].lines if one.get_linestyle() == ":"]
    plt.close(figure)
    assert dotted == [3, 6]


def test_every_figure_that_the_lines_suffice_for_is_drawn_and_the_same_again(tmp_path: Path) -> None:
    assert draw(LINES[:3], tmp_path) == []
    scores = {"a": (0.9, 0.9), "b": (0.6, 0.8), "c": (0.2, 0.6), "d": (0.5, 0.6)}
    four = relate(scores)
    dropped = [{**each, "config": {**each["config"], "drop": 0.1}} for each in four]
    curved = [{**each, "curve": [1.0, 0.5]} for each in SWEEP[-2:]]
    paths = draw([*SWEEP[8:-2], *curved, *four, *dropped], tmp_path)
    assert [path.name for path in paths] == ["sweep.svg", "stability.svg", "stability-2.svg", "discontinuity.svg"]
    texts = {path.name: path.read_text() for path in paths}
    assert all(text.rstrip().endswith("</svg>") for text in texts.values())
    (again,) = draw(dropped, tmp_path / "again")
    assert again.read_text() == texts["stability-2.svg"]
