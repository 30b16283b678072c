"""Many runs: a grid of learning rates on one seed, then the other seeds at the best of them; any number of processes.

Every process reads the lines that there are, takes a run that is ready and that nobody else has, carries it out and
appends its line. A run is taken by locking a file, which the system unlocks when a process ends, however it ends. So a
plan can be stopped and gone on with at any time, and several commands can work on one folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

if TYPE_CHECKING:
    from benchmarks.rig.run import Run

Lines = Mapping[str, dict[str, Any]]
Execute = Callable[["Run"], dict[str, Any]]
# Seconds between looks at what other processes have done.
LOOK = 2.0


@dataclass(frozen=True)
class Search:
    """One method on one task: the runs of its grid, and of the other seeds at the learning rate that is best there.

    Attributes:
        grid: one run per learning rate, all with the same seed.
        seeds: the other seeds.
        widen: whether a best rate at an end of the grid asks for the next one beyond it.
    """

    grid: tuple[Run, ...]
    seeds: tuple[int, ...]
    widen: bool = False

    def wanted(self, lines: Lines) -> tuple[Run, ...]:
        """The grid, as far as the lines say that it is to be widened."""
        grid = sorted(self.grid, key=lambda run: run.lr)
        while self.widen and (best := _best(grid, lines)) in (grid[0], grid[-1]):
            new = replace(best, lr=beside(best.lr, best == grid[-1]))
            grid = [*grid, new] if best == grid[-1] else [new, *grid]
        return tuple(grid)

    def best(self, lines: Lines) -> Run | None:
        """The run of the grid with the best validation score, among equals the smallest loss; None until all ended."""
        return _best(self.wanted(lines), lines)

    def open(self, lines: Lines) -> list[Run]:
        """Runs that are ready and not done."""
        best = self.best(lines)
        ready = self.wanted(lines) if best is None else tuple(replace(best, seed=seed) for seed in self.seeds)
        return [run for run in ready if run.key not in lines]

    def left(self, lines: Lines) -> int:
        """How many runs are to be done, ready or not."""
        best = self.best(lines)
        return len(self.open(lines)) + (len(self.seeds) if best is None else 0)


def _best(grid: Sequence[Run], lines: Lines) -> Run | None:
    if any(run.key not in lines for run in grid):
        return None
    return max(grid, key=lambda run: rank_of(lines[run.key]))


def beside(lr: float, above: bool) -> float:
    """The next learning rate of 1, 3, 10, 30, … times a power of ten."""
    rates = [float(f"{digit}e{power}") for power in range(-9, 4) for digit in (1, 3)]
    return min(rate for rate in rates if rate > 1.01 * lr) if above else max(rate for rate in rates if rate < 0.99 * lr)


def rank_of(line: Mapping[str, Any]) -> tuple[float, float]:
    """What learning rates are chosen by: the validation score, then the validation loss. Nothing of the test."""
    if not line["val"]:
        return -float("inf"), 0.0
    return next(iter(line["val"].values())), -line["loss"]["val"]


def plan(
    runs: Iterable[Run], seeds: Sequence[int], lrs: Sequence[float], grid_seed: int, widen: bool = False
) -> list[Search]:
    """A search for each of `runs`, whose seeds and learning rates do not matter."""
    others = tuple(seed for seed in seeds if seed != grid_seed)
    return [Search(tuple(replace(run, seed=grid_seed, lr=lr) for lr in lrs), others, widen) for run in runs]


def read(folder: Path, curve: bool = False) -> dict[str, dict[str, Any]]:
    """All lines in a folder, by key, the later of two; a line that a dying process left half is not one.

    Args:
        curve: only those that have the loss of each step.
    """
    lines = {}
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if "curve" in line or not curve:
                lines[line["key"]] = line
    return lines


def append(folder: Path, line: Mapping[str, Any]) -> None:
    """Add a line to the file of its model and task, at once and by one process at a time."""
    config = line["config"]
    name = f"{Path(config['model']).name}-{config['task']}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(_locks(folder) / f"{name}.lock"), (folder / f"{name}.jsonl").open("ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":
            file.write(b"\n")  # after the half line of a process that died
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _locks(folder: Path) -> Path:
    """Where the locks of a folder are; empty files, which mean nothing when no process runs."""
    place = folder / ".locks"
    place.mkdir(parents=True, exist_ok=True)
    return place


def work(searches: Sequence[Search], folder: Path, execute: Execute, curve: bool = False) -> int:
    """Do runs until none is left that this process could do; returns how many failed.

    Args:
        execute: carries out a run and returns its line.
        curve: a run whose line has no losses of each step is not done.
    """
    failed: set[str] = set()
    while True:
        lines = read(folder, curve)
        ready = [run for search in searches for run in search.open(lines) if run.key not in failed]
        taken = next((run for run in ready if _do(run, folder, execute, curve, failed)), None)
        if taken is None:
            if not ready and (failed or not any(search.left(lines) for search in searches)):
                return len(failed)
            time.sleep(LOOK)


def _do(run: Run, folder: Path, execute: Execute, curve: bool, failed: set[str]) -> bool:
    """Carry out a run unless somebody else has it; whether it was carried out."""
    lock = FileLock(_locks(folder) / f"{run.key}.lock", timeout=0)
    try:
        with lock:
            if run.key in read(folder, curve):
                return True  # meanwhile somebody else has done it
            try:
                append(folder, execute(run))
            except Exception:
                failed.add(run.key)
                tqdm.write(f"failed: {run}\n{traceback.format_exc()}")
            return True
    except Timeout:
        return False


def work_in_processes(
    searches: Sequence[Search], folder: Path, execute: Execute, jobs: int, threads: int, curve: bool = False
) -> int:
    """Do all runs in so many processes and show the progress; returns how many are not done, because some failed.

    Ctrl-C ends them all, by a KeyboardInterrupt here.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(searches, folder, execute, curve), daemon=True) for _ in range(jobs)
    ]

    def left() -> int:
        lines = read(folder, curve)
        return sum(search.left(lines) for search in searches)

    def total() -> int:
        lines = read(folder, curve)
        return sum(len(search.wanted(lines)) + len(search.seeds) for search in searches)

    try:
        with _deaf_to_ctrl_c():
            for process in processes:
                process.start()
        with tqdm(total=total(), initial=total() - left(), desc="runs", unit="run", dynamic_ncols=True) as bar:
            while any(process.is_alive() for process in processes):
                for process in processes:
                    process.join(LOOK / len(processes))
                bar.total = total()
                show(bar, bar.total - left(), read(folder).values())
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    return left()


def carry_out(
    searches: Sequence[Search], folder: Path, execute: Execute, jobs: int, threads: int, curve: bool = False
) -> int:
    """`work_in_processes` for a command: returns its exit status and says what is left."""
    try:
        left = work_in_processes(searches, folder, execute, jobs, threads, curve)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if left:
        print(f"{left} runs are not done, because of the errors above", file=sys.stderr)
    return int(left > 0)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started here ignore Ctrl-C, which a terminal sends to all: their parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show(bar: Any, done: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Bring the bar up to what is done."""
    if done != bar.n:
        bar.update(done - bar.n)
        mean = statistics.mean(line["seconds"]["all"] for line in lines)
        bar.set_postfix_str(f"{mean:.0f} s a run")
