"""Batches: what an epoch has."""

from __future__ import annotations

from itertools import chain

from benchmarks.rig.batches import Batches


def test_each_epoch_has_every_row_once_in_other_batches() -> None:
    rows = [{"input_ids": [1] * (1 + number % 7), "labels": number} for number in range(23)]
    batches = Batches(rows, 5, seed=0, padding=0)
    first, second = ([batch["labels"].tolist() for batch in batches] for _ in range(2))
    assert len(batches) == len(first) == 5
    for epoch in (first, second):
        assert sorted(chain.from_iterable(epoch)) == [*range(23)]
    assert first != second
    assert [batch["labels"].tolist() for batch in Batches(rows, 5, seed=0, padding=0)] == first
