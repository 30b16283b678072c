"""The recipe's command line, and whole runs of its beds on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipe.__main__ import main, parser, searches_of
from benchmarks.recipe.beds import BEDS, LRS, Bed, methods
from benchmarks.rig.batches import collate
from benchmarks.rig.method import Setup
from benchmarks.rig.methods import parse
from benchmarks.rig.models import HEAD, build, candidate_modules, data_of
from benchmarks.rig.run import execute
from benchmarks.rig.runs import append, read


def test_every_method_of_every_bed_is_one_and_is_written_in_one_way() -> None:
    for bed in BEDS.values():
        for rank in (*bed.ranks, 2):
            for method in methods(bed, rank):
                assert parse(method).make()
                assert parse(parse(method).text) == parse(method)


@pytest.mark.parametrize("rank", [2, 8])
def test_the_methods_of_a_size_train_as_many_entries_as_lora_of_its_rank(rank: int, data: str, llama: str) -> None:
    task = data_of("docs", data, llama, 64)
    plain: Any = build(llama, task, "first", 0)
    names = candidate_modules(plain, "linear")
    layers = [plain.get_submodule(name) for name in names]
    of_rank_one = sum(layer.in_features + layer.out_features for layer in layers)
    density = of_rank_one / sum(layer.weight.numel() for layer in layers)
    batches = [collate(task.train[at : at + 2], 0) for at in (0, 2)]
    for text in methods(Bed(BEDS["docs"].run, (rank,), density, 2, 2), rank):
        spec = parse(text)
        own = spec.of_the_run.get("density", density)
        method, model = spec.make(), build(llama, task, "first", 0)
        setup = Setup(own, 0, 2, 1e-3, batches, HEAD, names)
        assert abs(method.trained(method.start(model, setup), setup) - rank * of_rank_one) <= 2


def searches(options: list[str], bed: str = "docs") -> list[Any]:
    return searches_of(parser().parse_args(["run", "--source", "x", "--beds", bed, *options]))


def run_of_two_steps(run: Any) -> Any:
    return type(run)(**{**vars(run), "steps": 2, "eval_every": 2})


def test_a_grid_is_searched_by_its_own_seed_and_a_single_rate_is_not() -> None:
    (search,) = searches(["--methods", "lora:r=2"])
    assert [run.lr for run in search.grid] == LRS
    assert {run.seed for run in search.grid} == {0}
    assert (search.seeds, search.widen) == ((1, 2, 3, 4, 5), True)
    (single,) = searches(["--methods", "lora:r=2", "--lrs", "6e-3", "--seeds", "3", "4"])
    assert [(run.seed, run.lr) for run in single.grid] == [(3, 6e-3)]
    assert (single.seeds, single.widen) == ((4,), False)
    assert len(searches(["--ranks", "2"])) == len(methods(BEDS["docs"], 2))


def test_runs_give_lines_that_tables_and_both_figures_are_made_of(
    data: str, tiny: str, llama: str, tmp_path: Path, capsys: Any
) -> None:
    wanted = [
        ("docs", "lora:r=2", 1),
        ("docs", "lora:r=2", 2),
        ("docs", "random:density=0.1", 1),
        ("cola", "lora:r=1", 1),
    ]
    for bed, name, seed in wanted:
        options = [
            "--model",
            llama if bed == "docs" else tiny,
            "--lrs",
            "1e-2",
            "--seeds",
            str(seed),
            "--methods",
            name,
        ]
        (search,) = searches(options, bed)
        (run,) = search.grid
        append(tmp_path, execute(run_of_two_steps(run), data))
    assert len(read(tmp_path)) == 4
    assert main(["report", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count("| method | lr | trained | seeds |") == 2
    assert told.count("loss on other text") == 1
    assert main(["plots", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["size.svg", "work.svg"]
    first = (tmp_path / "work.svg").read_text()
    assert main(["plots", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "work.svg").read_text() == first
