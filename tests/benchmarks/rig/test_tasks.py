"""The paper's tasks and models: what is read, held out and dropped, and what the heads compute, beside slow oracles."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.common import tasks as known
from benchmarks.rig.batches import Batches, collate
from benchmarks.rig.models import TaskModel, build
from benchmarks.rig.tasks import QUESTIONS, TASKS, PaperTask, _hold_out, encoded_task, load, without
from tests.benchmarks.tiny import HUB, hub_splits, write_model, write_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("name", TASKS)
def test_the_hub_gives_the_same_rows_with_another_tenth_held_out(
    name: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    splits = hub_splits(name, data)
    monkeypatch.setattr(known, "load_dataset", lambda *where: asked.append(where) or splits)
    hub, again, folder = load(name, "hub"), load(name, "hub"), load(name, data)
    assert asked == [HUB[name][0]] * 2
    assert hub.test == folder.test  # the official validation split, with its columns and labels
    assert len(hub.test) == 7
    every = [*folder.train, *folder.val]
    held_out = [every.index(row) for row in hub.val]
    assert len(held_out) == round(0.1 * len(every)) == 3
    assert hub.train == [row for number, row in enumerate(every) if number not in held_out]
    assert (hub.train, hub.val) == (again.train, again.val)
    for attribute in ("kind", "num_labels", "regression", "metric"):
        assert getattr(hub, attribute) == getattr(folder, attribute)


def test_a_tenth_is_held_out_at_random_and_by_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"label": number} for number in range(100)]
    train, val = _hold_out(rows)
    held_out = [row["label"] for row in val]
    assert held_out == sorted(held_out)
    assert held_out not in ([*range(10)], [*range(90, 100)])
    assert sorted([*(row["label"] for row in train), *held_out]) == [*range(100)]
    monkeypatch.setattr("benchmarks.rig.tasks.SPLIT_SEED", 1)
    assert _hold_out(rows)[1] != val


def test_what_is_dropped_differs_by_seed_and_keeps_the_order_of_the_rest() -> None:
    rows = [{"labels": number} for number in range(200)]
    kept = [[row["labels"] for row in without(rows, 0.1, seed)] for seed in range(3)]
    assert all(len(of) == 180 and of == sorted(of) for of in kept)
    dropped = [set(range(200)) - set(of) for of in kept]
    assert len({frozenset(of) for of in dropped}) == 3
    assert max(len(a & b) for a, b in ((dropped[0], dropped[1]), (dropped[1], dropped[2]))) < 10
    assert without(rows, 0.0, 0) == rows
    assert without(rows, 0.1, 0) == without(rows, 0.1, 0)


def test_each_epoch_has_every_row_once_in_other_batches() -> None:
    rows = [{"input_ids": [1] * (1 + number % 7), "labels": number} for number in range(23)]
    batches = Batches(rows, 5, seed=0, padding=0)
    first, second = ([batch["labels"].tolist() for batch in batches] for _ in range(2))
    assert len(batches) == len(first) == 5
    for epoch in (first, second):
        assert sorted(chain.from_iterable(epoch)) == [*range(23)]
    assert first != second
    assert [batch["labels"].tolist() for batch in Batches(rows, 5, seed=0, padding=0)] == first


def states(model: TaskModel, row: dict[str, Any]) -> Tensor:
    """Last hidden states (tokens, width) of one text alone, without padding."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model.body(**{name: torch.tensor([row[name]]) for name in names if name in row}).last_hidden_state[0]


def vector(model: TaskModel, row: dict[str, Any]) -> Tensor:
    """Of one text, as the model pools."""
    every = states(model, row)
    return every[0] if model.pooling == "first" else every.mean(0)


def head(model: TaskModel, x: Tensor) -> Tensor:
    """The head of texts and choices, without dropout."""
    dense, out = model.head.dense, model.head.out
    return out.weight @ torch.tanh(dense.weight @ x + dense.bias) + out.bias


def ready(name: str, data: str, tiny: str, pooling: str = "first") -> tuple[TaskModel, PaperTask, PaperTask]:
    """A model whose head is no longer near zero, the task as token numbers and as texts."""
    task = encoded_task(name, data, tiny, 128)
    model = build(tiny, task, pooling, 0).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3)
    return model, task, load(name, data)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_two_texts_are_one_vector_through_the_head(pooling: str, data: str, tiny: str) -> None:
    model, task, _ = ready("rte", data, tiny, pooling)
    with torch.no_grad():
        expected = torch.stack([head(model, vector(model, row)) for row in task.test])
        found = model(**collate(task.test, padding=0))
    torch.testing.assert_close(found.logits, expected)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_copa_compares_its_two_choices_each_read_alone_after_premise_and_question(
    pooling: str, data: str, tiny: str
) -> None:
    model, task, _ = ready("copa", data, tiny, pooling)
    tokenizer, losses, logits = AutoTokenizer.from_pretrained(tiny), [], []
    rows = known.read_lines(Path(data, "copa", "test.jsonl"))
    with torch.no_grad():
        for row in rows:
            ask = f"{row['premise']} {QUESTIONS[row['question']]}"
            a, b = (float(head(model, vector(model, tokenizer(ask, row[choice])))) for choice in ("choice1", "choice2"))
            logits.append([a, b])
            right = (a, b)[row["label"]]
            losses.append(math.log(math.exp(a) + math.exp(b)) - right)
        found = model(**collate(task.test, padding=0))
    torch.testing.assert_close(found.logits, torch.tensor(logits), rtol=1e-4, atol=1e-5)
    assert float(found.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_wsc_compares_two_spans_each_a_mean_of_its_tokens_weighted_by_attention(data: str, tiny: str) -> None:
    model, task, _ = ready("wsc", data, tiny)
    tokenizer, logits = AutoTokenizer.from_pretrained(tiny), []
    attention, out = model.head.attention, model.head.out
    rows = known.read_lines(Path(data, "wsc", "test.jsonl"))
    with torch.no_grad():
        for row, encoded in zip(rows, task.test, strict=True):
            pieces = [len(tokenizer.tokenize(word)) for word in row["text"].split()]
            every, spans = states(model, encoded), []
            for number in (1, 2):
                word = row["target"][f"span{number}_index"]
                words = len(row["target"][f"span{number}_text"].split())
                first = 1 + sum(pieces[:word])  # after [CLS]
                inside = every[first : first + sum(pieces[word : word + words])]
                weights = [math.exp(float(attention.weight[0] @ h + attention.bias)) for h in inside]
                spans.append(sum(w * h for w, h in zip(weights, inside, strict=True)) / sum(weights))
            logits.append(out.weight @ torch.cat(spans) + out.bias)
        found = model(**collate(task.test, padding=0))
    torch.testing.assert_close(found.logits, torch.stack(logits), rtol=1e-4, atol=1e-5)
    labels = torch.tensor([int(row["label"]) for row in rows])
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(torch.stack(logits), labels))
