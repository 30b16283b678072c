"""Tasks: what is read, held out and dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.common import tasks as known
from benchmarks.rig.models import data_of
from benchmarks.rig.tasks import HELD_OUT_SENTENCES, ORDER, hold_out, load, without
from tests.benchmarks.tiny import HUB, hub_splits


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
    with pytest.raises(ValueError, match="got 'boolq'"):
        load("boolq", data, tokenizer, 128)


def test_a_sentence_and_its_scrambled_twin_are_in_the_same_split_of_the_word_order(data: str, tiny: str) -> None:
    task = data_of(ORDER, data, tiny, 128)
    assert len(task.val) == len(task.test) == HELD_OUT_SENTENCES
    for rows in (task.train, task.val, task.test):
        assert [row["labels"] for row in rows] == [1, 0] * (len(rows) // 2)


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
