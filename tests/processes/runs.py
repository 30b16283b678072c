"""Does pretended runs of the paper's plan in a folder, with two workers; each worker logs what it begins.

`python tests/processes/runs.py FOLDER COMMANDS SLOW`: runs wait until so many commands have begun one, and those of
the task SLOW take an hour. The real plan, locks, lines and processes, without the seconds that importing torch takes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rig import runs

runs.LOOK = 0.05


@dataclass(frozen=True)
class Pretended:
    task: str
    seed: int = 0
    lr: float = 0.0
    model: str = "pretended"

    @property
    def key(self) -> str:
        return f"{self.task} {self.seed} {self.lr}"


def pretend(run: Pretended, log: Path, commands: int, slow: str) -> dict[str, Any]:
    with log.open("a") as file:
        file.write(f"{os.getppid()} {os.getpid()} {run.key}\n")
    while len({line.split()[0] for line in log.read_text().splitlines()}) < commands:
        time.sleep(0.02)
    time.sleep(3600 if run.task == slow else 0)
    config = {"model": run.model, "task": run.task}
    return {"key": run.key, "config": config, "val": {"accuracy": run.lr}, "loss": {"val": 1.0}, "seconds": {"all": 0}}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore Ctrl-C
    folder, commands, slow = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    searches = runs.plan([Pretended("a"), Pretended("b")], seeds=[0, 1, 2], lrs=[0.1, 0.2], grid_seed=0)
    execute = partial(pretend, log=folder / "log", commands=commands, slow=slow)
    sys.exit(runs.work_in_processes(searches, folder, execute, jobs=2, threads=1))
