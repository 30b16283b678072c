"""The plan of many runs: which are done, by whom; real processes that share a folder or are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rig import runs as many
from benchmarks.rig.run import Run
from benchmarks.rig.runs import append, beside, plan, read, work
from tests.processes.launch import PATIENCE

SCRIPT = Path(__file__).parents[2] / "processes" / "runs.py"
KEYS = {f"{task} {seed} {lr}" for task in "ab" for seed, lr in ((0, 0.1), (0, 0.2), (1, 0.2), (2, 0.2))}


def run_of(method: str = "sam") -> Run:
    return Run(model="tiny", task="rte", method=method, seed=0, lr=0.0, steps=2)


def line_of(run: Run, val: float, test: float, loss: float = 1.0) -> dict[str, Any]:
    return {
        "key": run.key,
        "config": {"model": run.model, "task": run.task},
        "val": {"accuracy": val},
        "test": {"accuracy": test},
        "loss": {"val": loss},
        "seconds": {"all": 1.0},
    }


def test_the_learning_rate_is_chosen_on_validation_alone_and_used_for_the_other_seeds() -> None:
    (search,) = plan([run_of()], seeds=[3, 4, 5], lrs=[0.1, 0.2, 0.3], grid_seed=3)
    assert [(r.seed, r.lr) for r in search.open({})] == [(3, 0.1), (3, 0.2), (3, 0.3)]
    scores = [(0.5, 1.0, 1.0), (0.7, 0.1, 2.0), (0.7, 0.2, 1.5)]
    lines = {r.key: line_of(r, *score) for r, score in zip(search.grid, scores, strict=True)}
    two = dict(list(lines.items())[:2])
    assert [r.lr for r in search.open(two)] == [0.3]
    assert search.left(two) == 3
    assert [(r.seed, r.lr) for r in search.open(lines)] == [(4, 0.3), (5, 0.3)]


def test_a_best_rate_at_an_end_of_a_grid_that_may_grow_asks_for_the_next_one_beyond_it() -> None:
    (search,) = plan([run_of()], seeds=[0, 1], lrs=[6e-3, 1e-2, 3e-3], grid_seed=0, widen=True)
    lines: dict[str, dict[str, Any]] = {}
    asked = []
    worth = {3e-3: 0.4, 6e-3: 0.5, 1e-2: 0.6, 3e-2: 0.7, 1e-1: 0.1}
    while (runs := search.open(lines)) and runs[0].seed == 0:
        assert search.left(lines) == len(runs) + 1
        asked += [run.lr for run in runs]
        lines |= {run.key: line_of(run, worth[run.lr], 0.0) for run in runs}
    assert asked == [3e-3, 6e-3, 1e-2, 3e-2, 1e-1]
    assert [(run.seed, run.lr) for run in runs] == [(1, 3e-2)]
    assert [beside(6e-3, above) for above in (True, False)] == [1e-2, 3e-3]


def test_finished_runs_are_skipped_and_a_half_line_is_not_one(tmp_path: Path) -> None:
    searches = plan([run_of(method="lora")], seeds=[0, 1], lrs=[1e-2, 1e-3], grid_seed=0)
    append(tmp_path, line_of(searches[0].grid[0], 0.5, 0.5))
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + '{"key": "half')
    assert len(read(tmp_path)) == 1
    done: list[Run] = []

    def pretend(run: Run) -> dict[str, Any]:
        done.append(run)
        return line_of(run, 0.1, 0.1)

    assert work(searches, tmp_path, pretend) == 0
    assert [(r.seed, r.lr) for r in done] == [(0, 1e-3), (1, 1e-2)]
    assert len(read(tmp_path)) == 3
    assert work(searches, tmp_path, pretend) == 0
    assert len(done) == 2


def test_a_run_without_a_curve_is_done_again_where_one_is_asked_for(tmp_path: Path) -> None:
    (search,) = searches = plan([run_of()], seeds=[0], lrs=[1e-2, 1e-3], grid_seed=0)
    first, second = search.grid
    append(tmp_path, line_of(first, 0.5, 0.5))
    append(tmp_path, {**line_of(second, 0.5, 0.5), "curve": [1.0]})
    done: list[Run] = []

    def pretend(run: Run) -> dict[str, Any]:
        done.append(run)
        return {**line_of(run, 0.1, 0.1), "curve": [2.0]}

    assert work(searches, tmp_path, pretend, curve=True) == 0
    assert done == [first]
    assert read(tmp_path)[first.key]["curve"] == [2.0]


def test_a_run_that_somebody_else_has_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (search,) = plan([run_of()], seeds=[0], lrs=[1e-2, 1e-3], grid_seed=0)
    mine, theirs = search.grid
    lock = many.FileLock(many._locks(tmp_path) / f"{theirs.key}.lock")
    lock.acquire()
    done: list[Run] = []

    def pretend(run: Run) -> dict[str, Any]:
        done.append(run)
        return line_of(run, 0.1, 0.1)

    def others_finish(seconds: float) -> None:
        append(tmp_path, line_of(theirs, 0.2, 0.2))
        lock.release()

    monkeypatch.setattr(many.time, "sleep", others_finish)
    assert work([search], tmp_path, pretend) == 0
    assert done == [mine]


def test_a_failing_run_is_told_and_the_others_are_done(tmp_path: Path, capsys: Any) -> None:
    searches = plan([run_of(), run_of(method="lora")], seeds=[0], lrs=[1e-2], grid_seed=0)

    def pretend(run: Run) -> dict[str, Any]:
        if run.method == "sam":
            raise RuntimeError("out of luck")
        return line_of(run, 0.1, 0.1)

    assert work(searches, tmp_path, pretend) == 1
    assert "out of luck" in capsys.readouterr().out
    assert list(read(tmp_path)) == [searches[1].grid[0].key]


def start(folder: Path, commands: int = 1, slow: str = "none") -> subprocess.Popen[str]:
    """A command in a group of processes of its own, as a terminal starts it."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(folder), str(commands), slow]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def log(folder: Path) -> list[list[str]]:
    """[command, worker, run] of every run that was begun, the first two as numbers of processes."""
    file = folder / "log"
    return [line.split(" ", 2) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_commands_that_share_a_folder_do_no_run_twice(tmp_path: Path) -> None:
    both = [start(tmp_path, commands=2) for _ in range(2)]
    told = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert Counter(run for _, _, run in log(tmp_path)) == Counter(KEYS)
    assert {command for command, *_ in log(tmp_path)} == {str(process.pid) for process in both}
    assert set(read(tmp_path)) == KEYS


@pytest.mark.skipif(os.name != "posix", reason="signals a group of processes")
def test_ctrl_c_ends_all_processes_at_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    stopped = start(tmp_path, slow="b")
    wait_until(lambda: len(read(tmp_path)) == 4 and len(log(tmp_path)) >= 5)  # all of a; a worker is busy with b
    os.killpg(stopped.pid, signal.SIGINT)
    told = stopped.communicate(timeout=PATIENCE)[1]
    assert told.count("Traceback") == 1  # the command's own, which its caller catches; none of a worker's
    assert told.rstrip().endswith("KeyboardInterrupt")
    before = log(tmp_path)
    for worker in {int(worker) for _, worker, _ in before}:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    again = start(tmp_path)
    told = again.communicate(timeout=PATIENCE)[1]
    assert again.returncode == 0, told
    assert {run for _, _, run in log(tmp_path)[len(before) :]} == {key for key in KEYS if key.startswith("b")}
    assert set(read(tmp_path)) == KEYS
