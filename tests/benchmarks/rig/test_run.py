"""The paper's runner: whole runs of a few steps, and its command line."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper.__main__ import PRESETS, arguments, main, per_task, runs_of
from benchmarks.rig.batches import Batches
from benchmarks.rig.methods import METHODS, parse
from benchmarks.rig.models import build
from benchmarks.rig.run import Run, execute
from benchmarks.rig.runs import Search, append
from benchmarks.rig.tasks import TASKS, Row, encoded_task
from tests.benchmarks.lines import LINES
from tests.benchmarks.tiny import write_model, write_tasks


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """Each run collects garbage, which takes longer than the run where so much is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run(model: str) -> Callable[..., Run]:
    def make(**options: Any) -> Run:
        given = {"task": "rte", "method": "sam", "seed": 0, "lr": 1e-2, "steps": 2, "eval_every": 1, "density": 0.02}
        return Run(model=model, **{**given, **options})

    return make


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_what_it_says_and_the_head(
    method: str, run: Callable[..., Run], data: str, model: str
) -> None:
    line = execute(run(method=method), data)
    encoder = build(model, encoded_task("rte", data, model, 128), "first", 0).body
    weights = sum(p.numel() for p in encoder.parameters())
    linear = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    entries = sum(p.numel() for m in linear for p in m.parameters())
    norms = sum(p.numel() for n, p in encoder.named_parameters() if "LayerNorm" in n)
    wanted = {
        "full": weights,
        "mixout": weights,
        "head": 0,
        "houlsby": 2 * 2 * (2 * 16 * 64 + 16 + 64) + norms,
        "bitfit": sum(p.numel() for n, p in encoder.named_parameters() if n.endswith("bias")),
        "lora": 8 * sum(m.in_features + m.out_features for m in linear),
        "shira": sum(m.in_features + m.out_features for m in linear),  # the smallest rank is 1
    }
    exact = wanted.get(method, math.floor(0.02 * entries))
    if method == "sam_tensor":
        exact = sum(math.floor(0.02 * p.numel()) for m in linear for p in m.parameters())
    if method == "supertuning":
        assert abs(line["trained"] - exact) <= len(linear)
    elif method == "ia3":
        assert 0 < line["trained"] < entries
    else:
        assert line["trained"] == exact
    assert line["steps"] == 2
    assert [step for step, *_ in line["history"]] == [1, 2]
    assert line["val"]
    assert (line["stored_bytes"] > 0) == (line["trained"] > 0)
    assert line["peak_bytes"] > 0
    json.dumps(line)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_learned_from_and_measured_by_its_metric(task: str, run: Callable[..., Run], data: str) -> None:
    line = execute(run(task=task), data, curve=True)
    metric = {"cola": "matthews", "stsb": "correlation", "mrpc": "accuracy_and_f1"}.get(task, "accuracy")
    assert [next(iter(line[split])) for split in ("val", "test", "train")] == [metric] * 3
    assert line["rows"] == {"train": 20, "val": 6, "test": 7}
    assert len(line["curve"]) == 2


def test_a_run_repeats_itself(run: Callable[..., Run], data: str) -> None:
    first, second = (execute(run(method="random", drop=0.1), data, curve=True) for _ in range(2))
    assert first["curve"] == second["curve"]
    assert first["history"] == second["history"]
    assert first["rows"]["train"] == 18


def test_the_key_is_of_the_whole_configuration(run: Callable[..., Run]) -> None:
    one = run()
    others = [run(seed=1), run(lr=2e-2), run(method="sam:budget=tensor"), run(drop=0.1), run(precision="bf16")]
    assert len({r.key for r in [one, *others]}) == 6
    assert run().key == one.key


def test_a_loss_that_is_not_finite_ends_the_run_at_its_best_model(run: Callable[..., Run], data: str) -> None:
    line = execute(run(method="full", lr=1e30, steps=8, eval_every=2), data)
    assert line["stopped"] == "diverged"
    assert line["steps"] < 8
    assert all(math.isfinite(value) for value in line["test"].values())


def test_a_method_that_the_time_ends_before_it_settles_is_finished_and_validated(
    run: Callable[..., Run], data: str
) -> None:
    line = execute(run(method="diffpruning", steps=100, seconds=1e-9), data)
    assert (line["stopped"], line["steps"], line["best_step"]) == ("seconds", 1, 1)
    assert line["val"]
    assert math.isfinite(line["loss"]["val"])


def test_all_methods_learn_from_the_same_rows_of_which_each_seed_drops_others(
    run: Callable[..., Run], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Row]] = []

    class Watched(Batches):
        def __init__(self, rows: list[Row], *args: Any) -> None:
            super().__init__(rows, *args)
            seen.append(rows)

    monkeypatch.setattr("benchmarks.rig.run.Batches", Watched)
    dropped = []
    for method, seed in (("head", 0), ("random", 0), ("sam", 0), ("head", 1)):
        seen.clear()
        execute(run(method=method, seed=seed, drop=0.1, steps=1), data)
        assert all(rows == seen[0] for rows in seen)  # what is selected on and what is trained on
        every = encoded_task("rte", data, run().model, 128).train
        dropped.append([number for number, row in enumerate(every) if row not in seen[0]])
    assert [len(of) for of in dropped] == [2] * 4
    assert dropped[0] == dropped[1] == dropped[2] != dropped[3]


def test_a_warmed_head_is_kept(run: Callable[..., Run], data: str) -> None:
    options = {"task": "stsb", "steps": 1, "batch": 20}
    warm_up = ":head_warmup=30,head_warmup_lr=0.1"
    cold, warm = (execute(run(method=f"random{text}", **options), data, curve=True) for text in ("", warm_up))
    assert warm["curve"][0] < cold["curve"][0] - 1  # the mean of the labels is learned at once


def test_a_method_is_written_with_its_options_in_one_way() -> None:
    spec = parse("sam:train_mode=True,density=0.01,budget=tensor,head_warmup=5")
    assert spec.text == "sam:budget=tensor,density=0.01,head_warmup=5,train_mode=true"
    assert parse(spec.text) == spec
    assert spec.of_the_run == {"density": 0.01, "head_warmup": 5}
    for wrong in ("lora:rank=3", "sam:budget", "nothing"):
        with pytest.raises(ValueError, match="Expected"):
            parse(wrong)


def test_the_command_line_makes_a_run_for_each_task_and_method(model: str) -> None:
    text = f"run --source x --model {model} --tasks cb rte --methods sam lora:r=1 --max-steps 200 cb=100".split()
    found = runs_of(arguments(text))
    assert [(r.task, r.method, r.steps) for r in found] == [
        ("cb", "sam", 100), ("cb", "lora:r=1", 100), ("rte", "sam", 200), ("rte", "lora:r=1", 200),
    ]  # fmt: skip
    assert found[0].pooling == "first"
    assert Search((replace(found[0], lr=0.1),), ()).open({}) == [replace(found[0], lr=0.1)]
    with pytest.raises(ValueError, match="no number for rte"):
        per_task(["cb=1"], "rte")


def test_a_preset_changes_defaults_and_what_the_command_line_says_goes_before_it(model: str) -> None:
    text = f"run --source hub --preset paper --model {model} --methods sam --tasks cb --density 0.02".split()
    args = arguments(text)
    (found,) = runs_of(args)
    preset = {"batch": 16, "candidates": "all", "steps": 20000, "eval_every": 500, "patience": 40, "max_length": 256}
    assert found == Run(model=model, task="cb", method="sam", seed=0, lr=0.0, density=0.02, source="hub", **preset)
    assert args.lrs == [1e-4]
    assert PRESETS["paper"]["model"] == "roberta-base"
    assert PRESETS["paper"]["density"] == 0.005


def test_the_keys_of_runs_stay_so_that_results_are_found_again() -> None:
    assert Run(model="minilm", task="cb", method="sam", seed=0, lr=1e-3, steps=150).key == "0aac1dbff7ca3e34"


def test_tables_and_figures_are_made_of_the_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for number, line in enumerate(LINES):
        append(tmp_path, {"key": str(number), **line})
    monkeypatch.setattr(sys, "argv", ["paper", "table", "--out", str(tmp_path)])
    assert main() == 0
    assert "| sam | 20.0 ± 0.0 (1.5) | 65.0 ± 0.0 (1) |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["paper", "compare", "sam", "full", "--out", str(tmp_path)])
    assert main() == 0
    assert "| full | 0.1 | 1,234 | 2 | 20.0 ± 14.1 | 2 | 0.0 ± 14.1 | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        arguments(["compare", "sam:densty=0.1"])
    assert "got 'densty=0.1'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["paper", "plots", "--out", str(tmp_path), "--to", str(tmp_path / "figures")])
    assert main() == 0
    assert "drawn" not in capsys.readouterr().out  # of two methods at one density there is no figure


def test_a_stopped_command_says_that_it_can_go_on_and_one_with_failures_how_many_runs_are_left(
    data: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = ["paper", "run", "--source", data, "--model", model, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", text)

    def stopped(*args: Any) -> int:
        raise KeyboardInterrupt

    for answer, status, told in ((stopped, 130, "goes on from here"), (lambda *args: 3, 1, "3 runs are not done")):
        monkeypatch.setattr("benchmarks.paper.__main__.work_in_processes", answer)
        assert main() == status
        assert told in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.paper.__main__.work_in_processes", lambda *args: 0)
    assert main() == 0
