"""Laws of the measurement of costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peft_sam.sparse.costs import CPU, Costs

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.extra
def test_the_measured_row_names_costs_and_none_of_them_is_free() -> None:
    command = [sys.executable, FOLDER / "calibrate.py", "--tiny", "--device", "cpu"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    costs = json.loads(printed[0])["costs"]
    assert min(Costs(**costs)[:5]) > 0
    assert {name for name, cost in CPU._asdict().items() if cost is not None} - set(costs) == {"few_tokens", "large"}
    assert f"Costs({', '.join(f'{name}={cost}' for name, cost in costs.items())})" in printed[1]
