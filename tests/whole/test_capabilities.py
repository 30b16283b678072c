"""PEFT's table of what each method can, made by its own script, where a checkout of its repository is at hand."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import peft_sam

REPOSITORY = os.environ.get("PEFT_REPOSITORY") or None
# special to one method, and a list of words
OF_LORA = ("extras",)


def says_no(value: Any) -> bool:
    answers = value.values() if isinstance(value, dict) else [value]
    return any(answer in (False, None, "unknown", "not_applicable") or answer == [] for answer in answers)


@pytest.mark.extra
@pytest.mark.skipif(REPOSITORY is None, reason="PEFT_REPOSITORY names no checkout of PEFT's repository")
def test_every_row_of_peft_s_own_table_says_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REPOSITORY is not None
    assert peft_sam.SamConfig().peft_type == "SAM_SPARSE"  # the import has registered it
    found = tmp_path / "capabilities.json"
    monkeypatch.setattr(sys, "argv", ["generate", "--methods", "sam_sparse", "--output", str(found)])
    runpy.run_path(str(Path(REPOSITORY) / "scripts" / "generate_method_capabilities.py"), run_name="__main__")
    features = json.loads(found.read_text())["methods"]["SAM_SPARSE"]["features"]
    assert {name: row for name, row in features.items() if name not in OF_LORA and says_no(row["value"])} == {}
    assert not any("probing failed" in row.get("note", "") for row in features.values())
