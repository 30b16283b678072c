"""Laws of selecting with several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_sam import Selection

ROOT = Path(__file__).parent.parent


def select(processes: int, file: Path) -> Selection:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", "-m", "tests.select_in_processes", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Selection.load(file)


@pytest.mark.slow
def test_two_processes_select_what_one_selects(tmp_path: Path) -> None:
    one, two = (select(processes, tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    assert two.samples == one.samples == 24
    assert two.threshold == pytest.approx(one.threshold, rel=1e-5)
    different = sum(len(set(one.indices[name].tolist()) ^ set(two.indices[name].tolist())) for name in one.indices)
    # entries whose scores agree with the threshold to rounding may change places
    assert different <= 2
