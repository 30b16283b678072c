"""What the tests of the benchmarks learn from: tiny tasks and models, and a tenth of Python's documentation."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from benchmarks.rig import language
from tests.benchmarks.tiny import write_language_model, write_model, write_tasks


@pytest.fixture(scope="package", autouse=True)
def _few_objects() -> Iterator[None]:
    """Each run collects garbage, which takes longer than the run where so much is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _few_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "topics", {name: language.topics[name] for name in sorted(language.topics)[::10]})


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tasks."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an encoder."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a language model."""
    return write_language_model(tmp_path_factory.mktemp("model") / "llama")
