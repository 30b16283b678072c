"""Laws of the measurement of a device: each line comes at once, and all of it runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def lines_of(*options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(FOLDER / "device.py"), "--tiny", "--device", "cpu", *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def test_without_time_every_measurement_is_named_and_left_out(tmp_path: Path) -> None:
    lines = lines_of("--minutes", "0", "--texts", str(tmp_path), "--out", str(tmp_path / "lines"))
    assert lines == [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert all(line["left_out"] for line in lines[1:])
    assert [line["what"] for line in lines[:2]] == ["environment", "step"]
    kinds = {line["what"] for line in lines[1:]}
    assert kinds == {
        "step", "decode", "pass", "threshold", "optimizer", "calibration", "switch", "one token, compiled", "paper",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.extra  # two minutes
def test_all_of_it_runs_on_a_cpu_and_says_what_was_aimed_at(tmp_path: Path) -> None:
    lines = lines_of()
    assert not [line for line in lines if "error" in line]
    aims = [aim["found"] for line in lines for aim in line.get("aims", {}).values()]
    assert len(aims) == 3 * 2 + 4 + 2
    assert min(aims) > 0
