"""Starts the scripts of this folder, and ends those that hang."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
# seconds; it only ends a hang, so it is long enough for a machine that does ten other things
PATIENCE = 600.0


def start(script: str, *arguments: str, processes: int, errors: IO[str] | None = None) -> list[subprocess.Popen[str]]:
    """Start a script of this folder in processes that know of each other (torchrun needs a torch with libuv)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **size,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"tests.processes.{script}", *arguments],
            cwd=ROOT,
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL if errors else subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        for rank in range(processes)
    ]


def launch(script: str, processes: int, file: Path) -> Path:
    """Run a script of this folder, which writes a file, in so many processes; one that fails ends the others."""
    with tempfile.TemporaryFile("w+") as errors:
        running = start(script, str(file), processes=processes, errors=errors)
        stop = time.monotonic() + PATIENCE
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            if time.monotonic() > stop:
                break
            time.sleep(0.05)
        codes = [one.poll() for one in running]
        for one in running:
            one.kill()
            one.wait()
        errors.seek(0)
        assert codes == [0] * processes, errors.read()[-3000:]
    return file
