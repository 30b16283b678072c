"""Models: what they compute, beside slow oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.rig.batches import collate
from benchmarks.rig.models import build, data_of


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
