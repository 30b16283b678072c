"""Commands that share a folder of results, and one that is stopped: real processes, locks and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.paper.runs import read

SCRIPT = Path(__file__).parent / "runs_in_processes.py"
KEYS = {f"{task} {seed} {lr}" for task in "ab" for seed, lr in ((0, 0.1), (0, 0.2), (1, 0.2), (2, 0.2))}


def start(folder: Path, commands: int = 1, slow: str = "none") -> subprocess.Popen[str]:
    """A command in a group of processes of its own, as a terminal starts it."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(folder), str(commands), slow]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def log(folder: Path) -> list[list[str]]:
    """[command, worker, run] of every run that was begun, the first two as numbers of processes."""
    file = folder / "log"
    return [line.split(" ", 2) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_commands_that_share_a_folder_do_no_run_twice(tmp_path: Path) -> None:
    both = [start(tmp_path, commands=2) for _ in range(2)]
    told = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert Counter(run for _, _, run in log(tmp_path)) == Counter(KEYS)
    assert {command for command, *_ in log(tmp_path)} == {str(process.pid) for process in both}
    assert set(read(tmp_path)) == KEYS


@pytest.mark.skipif(os.name != "posix", reason="signals a group of processes")
def test_ctrl_c_ends_all_processes_at_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    stopped = start(tmp_path, slow="b")
    wait_until(lambda: len(read(tmp_path)) == 4 and len(log(tmp_path)) >= 5)  # all of a; a worker is busy with b
    os.killpg(stopped.pid, signal.SIGINT)
    told = stopped.communicate(timeout=30)[1]
    assert told.count("Traceback") == 1  # the command's own, which its caller catches; none of a worker's
    assert told.rstrip().endswith("KeyboardInterrupt")
    before = log(tmp_path)
    for worker in {int(worker) for _, worker, _ in before}:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    again = start(tmp_path)
    told = again.communicate(timeout=60)[1]
    assert again.returncode == 0, told
    assert {run for _, _, run in log(tmp_path)[len(before) :]} == {key for key in KEYS if key.startswith("b")}
    assert set(read(tmp_path)) == KEYS
