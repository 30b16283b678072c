"""The paper's command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.__main__ import main, parser, runs_of
from benchmarks.rig.runs import Search, append
from tests.benchmarks.lines import LINES


def test_the_command_line_makes_a_run_for_each_task_and_method() -> None:
    text = [
        "run",
        "--source",
        "x",
        "--model",
        "tiny",
        "--tasks",
        "cb",
        "rte",
        "--methods",
        "sam",
        "lora:r=1",
        "--max-steps",
        "200",
    ]
    found = runs_of(parser().parse_args(text))
    assert [(r.task, r.method) for r in found] == [
        ("cb", "sam"),
        ("cb", "lora:r=1"),
        ("rte", "sam"),
        ("rte", "lora:r=1"),
    ]
    assert {(r.pooling, r.source, r.steps) for r in found} == {("first", "folder", 200)}
    assert Search((replace(found[0], lr=0.1),), ()).open({}) == [replace(found[0], lr=0.1)]


def test_tables_and_figures_are_made_of_the_lines_alone(tmp_path: Path, capsys: Any) -> None:
    for number, line in enumerate(LINES):
        append(tmp_path, {"key": str(number), **line})
    out = ["--out", str(tmp_path)]
    assert main(["table", *out]) == 0
    assert "| sam | 20.0 ± 0.0 (1.5) | 65.0 ± 0.0 (1) |" in capsys.readouterr().out
    assert main(["compare", "sam", "full", *out]) == 0
    assert "| full | 0.1 | 1,234 | 2 | 20.0 ± 14.1 | 2 | 0.0 ± 14.1 | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", "sam:densty=0.1"])
    assert "got 'densty=0.1'" in capsys.readouterr().err
    assert main(["plots", *out, "--to", str(tmp_path / "figures")]) == 0
    assert "drawn" not in capsys.readouterr().out  # of two methods at one density there is no figure


def test_a_stopped_command_says_that_it_can_go_on_and_one_with_failures_how_many_runs_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = ["run", "--source", "x", "--model", "tiny", "--out", str(tmp_path)]

    def stopped(*args: Any) -> int:
        raise KeyboardInterrupt

    for answer, status, told in ((stopped, 130, "goes on from here"), (lambda *args: 3, 1, "3 runs are not done")):
        monkeypatch.setattr("benchmarks.rig.runs.work_in_processes", answer)
        assert main(text) == status
        assert told in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.rig.runs.work_in_processes", lambda *args: 0)
    assert main(text) == 0
