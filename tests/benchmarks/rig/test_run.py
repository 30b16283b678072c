"""Whole runs of a few steps, and what identifies them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from benchmarks.common import RESULTS
from benchmarks.rig.batches import Batches
from benchmarks.rig.language import DOCS
from benchmarks.rig.methods import METHODS, parse
from benchmarks.rig.models import build, data_of
from benchmarks.rig.run import Run, execute
from benchmarks.rig.runs import read
from benchmarks.rig.tasks import TASKS, Row


@pytest.fixture
def run(tiny: str) -> Callable[..., Run]:
    def make(**options: Any) -> Run:
        given = {
            "model": tiny,
            "task": "rte",
            "method": "sam",
            "seed": 0,
            "lr": 1e-2,
            "steps": 2,
            "eval_every": 1,
            "density": 0.02,
        }
        return Run(**{**given, **options})

    return make


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_what_it_says_and_the_head(
    method: str, run: Callable[..., Run], data: str, tiny: str
) -> None:
    few = ":max_batches=3" if method == "movement" else ""
    line = execute(run(method=f"{method}{few}"), data)
    encoder = build(tiny, data_of("rte", data, tiny, 128), "first", 0).body
    weights = sum(p.numel() for p in encoder.parameters())
    linear = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    entries = sum(p.numel() for m in linear for p in m.parameters())
    wanted = {
        "full": weights,
        "bitfit": sum(p.numel() for n, p in encoder.named_parameters() if n.endswith("bias")),
        "lora": 8 * sum(m.in_features + m.out_features for m in linear),
        "shira": sum(m.in_features + m.out_features for m in linear),  # the smallest rank is 1
        "hybrid": 4 * sum(m.in_features + m.out_features for m in linear) + math.floor(0.02 * entries),
    }
    exact = wanted.get(method, math.floor(0.02 * entries))
    if method == "sam_tensor":
        exact = sum(math.floor(0.02 * p.numel()) for m in linear for p in m.parameters())
    if method == "supertuning":
        assert abs(line["trained"] - exact) <= len(linear)
    else:
        assert line["trained"] == exact
    assert line["steps"] == 2
    assert [step for step, *_ in line["history"]] == [1, 2]
    assert line["val"]
    assert line["stored_bytes"] > 0
    assert line["peak_bytes"] > 0
    json.dumps(line)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_learned_from_and_measured_by_its_metric(task: str, run: Callable[..., Run], data: str) -> None:
    line = execute(run(task=task), data, curve=True)
    metric = {"cola": "matthews", "stsb": "correlation", "mrpc": "accuracy_and_f1"}.get(task, "accuracy")
    assert [next(iter(line[split])) for split in ("val", "test", "train")] == [metric] * 3
    sizes = {"train": 1440, "val": 480, "test": 480} if task == "order" else {"train": 20, "val": 6, "test": 7}
    assert line["rows"] == sizes
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
    for method, seed in (("lora", 0), ("random", 0), ("sam", 0), ("lora", 1)):
        seen.clear()
        execute(run(method=method, seed=seed, drop=0.1, steps=1), data)
        assert all(rows == seen[0] for rows in seen)  # what is selected on and what is trained on
        every = data_of("rte", data, run().model, 128).train
        dropped.append([number for number, row in enumerate(every) if row not in seen[0]])
    assert [len(of) for of in dropped] == [2] * 4
    assert dropped[0] == dropped[1] == dropped[2] != dropped[3]


def test_a_warmed_head_is_kept(run: Callable[..., Run], data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"task": "stsb", "steps": 1, "batch": 20}
    monkeypatch.setattr("benchmarks.rig.run.HEAD_WARMUP_LR", 0.1)
    warm_up = ":head_warmup=30"
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


def test_a_language_model_learns_the_documentation_and_is_measured_on_it_and_on_other_text(
    run: Callable[..., Run], data: str, llama: str
) -> None:
    options = {"task": DOCS, "model": llama, "max_length": 32, "batch": 4}
    line = execute(run(method="lora", lr=1e-2, steps=20, eval_every=20, schedule="cosine", **options), data, curve=True)
    assert line["head"] == 0
    assert set(line["val"]) == {"documentation"}
    assert set(line["test"]) == {"documentation", "other"}
    assert line["loss"]["val"] == pytest.approx(-line["val"]["documentation"], rel=1e-5)
    assert sum(line["curve"][-3:]) < sum(line["curve"][:3])


def test_the_seconds_of_a_run_s_parts_add_up(run: Callable[..., Run], data: str) -> None:
    line = execute(run(), data)
    for kind in ("seconds", "cpu"):
        parts = {part: seconds for part, seconds in line[kind].items() if part != "all"}
        assert set(parts) == {"loading", "selection", "training", "validation", "measuring"}
        assert min(parts.values()) > 0
        assert 0.5 * line[kind]["all"] < sum(parts.values()) <= line[kind]["all"]  # the rest lies between the parts


@pytest.mark.parametrize("folder", ["paper", "recipe"])
def test_the_lines_that_there_are_have_the_keys_of_their_configurations(folder: str) -> None:
    names = {field.name for field in fields(Run)}
    lines = read(RESULTS / folder)
    assert lines
    for key, line in lines.items():
        known = {name: value for name, value in line["config"].items() if name in names}
        assert Run(**known).key == key
        assert all(value is None for name, value in line["config"].items() if name not in names)
