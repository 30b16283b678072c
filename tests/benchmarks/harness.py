"""PEFT's method comparison, where a checkout of its repository is at hand, on the CPU, which it refuses by itself."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft.utils
import pytest

REPOSITORY = os.environ.get("PEFT_REPOSITORY") or None
EXPERIMENTS = Path(__file__).parents[2] / "benchmarks" / "peft_comparison" / "experiments"

needs_harness = pytest.mark.skipif(REPOSITORY is None, reason="PEFT_REPOSITORY names no checkout of PEFT's repository")


def experiments(model: str) -> list[Path]:
    """The folders of the experiments with a model."""
    return sorted(EXPERIMENTS.glob(f"*/{model}*"))


@contextmanager
def modules_of(task: str, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Modules of one comparison by name; `utils` is the first."""
    assert REPOSITORY is not None
    monkeypatch.syspath_prepend(str(Path(REPOSITORY) / "method_comparison" / task))
    monkeypatch.setattr(peft.utils, "infer_device", lambda: "cuda")
    if sys.version_info < (3, 12):  # the harness's option `delete` is newer
        plain = tempfile.TemporaryDirectory
        monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda *args, delete=True, **kwargs: plain(*args, **kwargs))
    state = np.random.get_state()
    modules: dict[str, Any] = {name: importlib.import_module(name) for name in names}
    modules["utils"].device = "cpu"
    try:
        yield modules
    finally:
        np.random.set_state(state)
        for name in modules:
            del sys.modules[name]
