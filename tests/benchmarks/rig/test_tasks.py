"""Tasks and models: what is read, held out and dropped, and what models compute, beside slow oracles."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.common import tasks as known
from benchmarks.rig import language
from benchmarks.rig.batches import Batches, collate
from benchmarks.rig.models import build, candidate_modules, data_of
from benchmarks.rig.tasks import HELD_OUT_SENTENCES, ORDER, hold_out, load, without
from tests.benchmarks.tiny import HUB, hub_splits, write_language_model, write_model, write_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_language_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("name", HUB)
def test_the_hub_gives_the_same_rows_with_another_tenth_held_out(
    name: str, data: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    splits = hub_splits(name, data)
    monkeypatch.setattr(known, "load_dataset", lambda *where: asked.append(where) or splits)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    hub, again, folder = (load(name, source, tokenizer, 128) for source in ("hub", "hub", data))
    assert asked == [HUB[name][0]] * 2
    assert hub.test == folder.test  # the official validation split, with its columns and labels
    assert len(hub.test) == 7
    every = [*folder.train, *folder.val]
    held_out = [every.index(row) for row in hub.val]
    assert len(held_out) == round(0.1 * len(every)) == 3
    assert hub.train == [row for number, row in enumerate(every) if number not in held_out]
    assert (hub.train, hub.val) == (again.train, again.val)
    for attribute in ("num_labels", "regression", "metric"):
        assert getattr(hub, attribute) == getattr(folder, attribute)


def test_a_folder_without_validation_rows_and_a_task_that_is_none_are_told(
    data: str, tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "rte").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rte" / f"{split}.jsonl").write_text(Path(data, "rte", f"{split}.jsonl").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(FileNotFoundError, match=r"val\.jsonl"):
        load("rte", str(tmp_path), tokenizer, 128)
    with pytest.raises(ValueError, match="got 'copa'"):
        load("copa", data, tokenizer, 128)


def test_a_sentence_and_its_scrambled_twin_are_in_the_same_split_of_the_word_order(data: str, tiny: str) -> None:
    task = data_of(ORDER, data, tiny, 128)
    assert len(task.val) == len(task.test) == HELD_OUT_SENTENCES
    for rows in (task.train, task.val, task.test):
        assert [row["labels"] for row in rows] == [1, 0] * (len(rows) // 2)


def test_the_documentation_s_blocks_are_whole_and_those_held_out_are_of_other_topics(data: str, llama: str) -> None:
    task = language.load(data, AutoTokenizer.from_pretrained(llama), 32, (9, 8, 3))
    assert {len(row["input_ids"]) for rows in (task.train, task.val, task.test) for row in rows} == {32}
    assert [row["labels"] for row in task.test] == [language.DOCUMENTATION] * 8 + [language.OTHER] * 3
    assert len(task.val) == 9
    train, val, test = ({tuple(row["input_ids"]) for row in rows} for rows in (task.train, task.val, task.test))
    assert not val & test
    assert len((val | test) & train) <= 1  # a line of stars may be anywhere


def test_a_language_model_s_output_is_the_mean_log_likelihood_of_a_block_after_its_first_token(
    data: str, llama: str
) -> None:
    task = data_of(language.DOCS, data, llama, 32)
    model = build(llama, task, "first", 0).eval()
    rows = [*task.test[:2], *task.test[-2:]]
    with torch.no_grad():
        found = model(**collate(rows, padding=0))
        expected = []
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            likelihoods = model.body(input_ids=ids[None]).logits[0].log_softmax(-1)
            expected.append(likelihoods[:-1].gather(1, ids[1:, None]).mean())
    torch.testing.assert_close(found.logits, torch.stack(expected))
    assert float(found.loss) == pytest.approx(-float(torch.stack(expected).mean()), rel=1e-5)
    both = language.log_likelihoods(found.logits.numpy(), [row["labels"] for row in rows])
    assert both["documentation"] == pytest.approx(float(torch.stack(expected)[:2].mean()), rel=1e-5)
    assert both["other"] == pytest.approx(float(torch.stack(expected)[2:].mean()), rel=1e-5)
    linear = candidate_modules(model, "linear")
    assert len(linear) == 2 * 7
    assert "body.lm_head" not in linear


def test_a_tenth_is_held_out_at_random_and_by_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"label": number} for number in range(100)]
    train, val = hold_out(rows)
    held_out = [row["label"] for row in val]
    assert held_out == sorted(held_out)
    assert held_out not in ([*range(10)], [*range(90, 100)])
    assert sorted([*(row["label"] for row in train), *held_out]) == [*range(100)]
    monkeypatch.setattr("benchmarks.rig.tasks.SPLIT_SEED", 1)
    assert hold_out(rows)[1] != val


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


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_two_texts_are_one_vector_through_the_head(pooling: str, data: str, tiny: str) -> None:
    task = data_of("rte", data, tiny, 128)
    model: Any = build(tiny, task, pooling, 0).eval()
    dense, out = model.head.dense, model.head.out
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3)
        expected = []
        for row in task.test:  # each alone, without padding
            tokens = {name: torch.tensor([ids]) for name, ids in row.items() if name != "labels"}
            states = model.body(**tokens).last_hidden_state[0]
            vector = states[0] if pooling == "first" else states.mean(0)
            expected.append(out.weight @ torch.tanh(dense.weight @ vector + dense.bias) + out.bias)
        found = model(**collate(task.test, padding=0))
    torch.testing.assert_close(found.logits, torch.stack(expected))
    labels = torch.tensor([row["labels"] for row in task.test])
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(torch.stack(expected), labels))


@pytest.mark.parametrize("wrong", [{"pooling": "last"}, {"pooling": "mean", "precision": "fp16"}], ids=str)
def test_a_pooling_or_precision_that_there_is_not_is_told(wrong: dict[str, str], data: str, tiny: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        build(tiny, data_of("rte", data, tiny, 128), seed=0, **wrong)
