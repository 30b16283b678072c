"""Starts the scripts of this folder, and ends those that hang."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

# seconds; it only ends a hang, so it is long enough for a machine that does ten other things
PATIENCE = 600.0
# one process imports, which takes longest, and all others are forked from it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"tests.processes.{script}" for script in ("fail", "selecting", "shard", "train", "zero")]
)


@dataclass
class Rank:
    """One of the processes that run a script together."""

    process: BaseProcess
    output: Path

    def printed(self) -> str:
        """All that it printed, once it has ended."""
        self.process.join(PATIENCE)
        return self.output.read_text()


def start(script: str, *arguments: str, processes: int, folder: Path) -> list[Rank]:
    """Start a script of this folder in processes that know of each other and print to files of a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    together |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        variables = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = folder / f"{script}-{processes}-{rank}.txt"
        output.touch()
        process = FORKS.Process(target=_run, args=(script, arguments, variables, output))
        process.start()
        ranks.append(Rank(process, output))
    return ranks


def _run(script: str, arguments: tuple[str, ...], variables: dict[str, str], output: Path) -> None:
    """What one of the processes does."""
    os.environ.update(variables)
    sys.argv = [script, *arguments]
    warnings.simplefilter("ignore")
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    importlib.import_module(f"tests.processes.{script}").main()


def launch(script: str, processes: int, file: Path) -> Path:
    """Run a script of this folder, which writes a file, in so many processes; one that fails ends the others."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = start(script, str(file), processes=processes, folder=Path(folder))
        stop = time.monotonic() + PATIENCE
        while any(rank.process.exitcode is None for rank in ranks) and not any(rank.process.exitcode for rank in ranks):
            if time.monotonic() > stop:
                break
            time.sleep(0.05)
        codes = [rank.process.exitcode for rank in ranks]
        for rank in ranks:
            rank.process.kill()
        assert codes == [0] * processes, "\n".join(rank.printed()[-3000:] for rank in ranks)
    return file
