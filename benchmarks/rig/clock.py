"""Seconds of each part of a run, and the most memory that it took."""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Clock:
    """Seconds by the clock on the wall, and of work: of all threads of this process.

    A part within a part counts for itself alone.
    """

    def __init__(self, device: str) -> None:
        self.device, self.wall, self.cpu = device, Counter[str](), Counter[str]()
        self._part = ""
        self._last = (time.perf_counter(), time.process_time())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within is of the part `name`."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def seconds(self) -> dict[str, dict[str, float]]:
        """`seconds` and `cpu` by part, and of all of them."""
        found = {"seconds": self.wall, "cpu": self.cpu}
        return {kind: {**{part: of[part] for part in of if part}, "all": of.total()} for kind, of in found.items()}

    def _switch(self, name: str) -> str:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        self.wall[self._part] += now[0] - self._last[0]
        self.cpu[self._part] += now[1] - self._last[1]
        before, self._part, self._last = self._part, name, now
        return before


class PeakMemory:
    """The most memory that was taken since it was made: of the process, or of the GPU by this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the high-water mark

    def read(self) -> int:
        """In bytes. Where the system keeps one high-water mark for the whole process, that one."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
