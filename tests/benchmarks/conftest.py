"""Less text for the tests of the benchmarks: a tenth of Python's documentation."""

from __future__ import annotations

import pytest

from benchmarks.rig import language


@pytest.fixture(autouse=True)
def _few_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "topics", {name: language.topics[name] for name in sorted(language.topics)[::10]})
