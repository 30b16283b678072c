"""Models: what they compute, beside slow oracles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.common import tasks as known
from benchmarks.rig.batches import collate
from benchmarks.rig.models import build, data_of
from benchmarks.rig.special import QUESTIONS
from benchmarks.rig.tasks import Data


def ready(name: str, data: str, tiny: str, pooling: str = "first") -> tuple[Any, Data]:
    """A model whose head is no longer near zero, and its task."""
    task = data_of(name, data, tiny, 128)
    model = build(tiny, task, pooling, 0).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3)
    return model, task


def states(model: Any, row: Mapping[str, Any]) -> Tensor:
    """Last hidden states (tokens, width) of one text alone, without padding."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model.body(**{name: torch.tensor([row[name]]) for name in names}).last_hidden_state[0]


def output(model: Any, row: Mapping[str, Any]) -> Tensor:
    """What the head of texts and choices makes of one text alone."""
    every, dense, out = states(model, row), model.head.dense, model.head.out
    vector = every[0] if model.pooling == "first" else every.mean(0)
    return out.weight @ torch.tanh(dense.weight @ vector + dense.bias) + out.bias


def check(model: Any, task: Data, expected: list[Tensor]) -> None:
    """The logits of the test rows, and the mean cross-entropy."""
    found, truth = model(**collate(task.test, padding=0)), torch.tensor([row["labels"] for row in task.test])
    torch.testing.assert_close(found.logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(torch.stack(expected), truth))


@pytest.mark.parametrize("pooling", ["first", "mean"])
@torch.no_grad()
def test_two_texts_are_one_vector_through_the_head(pooling: str, data: str, tiny: str) -> None:
    model, task = ready("rte", data, tiny, pooling)
    check(model, task, [output(model, row) for row in task.test])


@pytest.mark.parametrize("pooling", ["first", "mean"])
@torch.no_grad()
def test_of_two_choices_each_is_read_alone_after_premise_and_question(pooling: str, data: str, tiny: str) -> None:
    model, task = ready("copa", data, tiny, pooling)
    tokenizer, expected = AutoTokenizer.from_pretrained(tiny), []
    for row in known.read_lines(Path(data, "copa", "test.jsonl")):
        ask = f"{row['premise']} {QUESTIONS[row['question']]}"
        expected.append(torch.cat([output(model, tokenizer(ask, row[name])) for name in ("choice1", "choice2")]))
    check(model, task, expected)


@torch.no_grad()
def test_of_two_spans_each_is_a_mean_of_its_tokens_weighted_by_attention(data: str, tiny: str) -> None:
    model, task = ready("wsc", data, tiny)
    tokenizer, expected = AutoTokenizer.from_pretrained(tiny), []
    attention, out = model.head.attention, model.head.out
    rows = known.read_lines(Path(data, "wsc", "test.jsonl"))
    for row, encoded in zip(rows, task.test, strict=True):
        pieces = [len(tokenizer.tokenize(word)) for word in row["text"].split()]
        every, spans = states(model, encoded), []
        for number in (1, 2):
            word, words = row["target"][f"span{number}_index"], row["target"][f"span{number}_text"].split()
            first = 1 + sum(pieces[:word])  # after [CLS]
            inside = every[first : first + sum(pieces[word : word + len(words)])]
            weights = [math.exp(float(attention.weight[0] @ h + attention.bias)) for h in inside]
            spans.append(sum(w * h for w, h in zip(weights, inside, strict=True)) / sum(weights))
        expected.append(out.weight @ torch.cat(spans) + out.bias)
    check(model, task, expected)


def test_a_span_that_is_cut_off_is_told(data: str, tiny: str) -> None:
    with pytest.raises(ValueError, match="is cut off: use a larger --max-length"):
        data_of("wsc", data, tiny, 3)


def test_a_model_that_lies_in_half_precision_is_trained_in_float32(data: str, tiny: str, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny).bfloat16().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    task = data_of("rte", data, str(tmp_path), 128)
    model = build(str(tmp_path), task, "first", 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(**collate(task.test, padding=0)).loss.isfinite()


@pytest.mark.parametrize("wrong", [{"pooling": "last"}, {"pooling": "mean", "precision": "fp16"}], ids=str)
def test_a_pooling_or_precision_that_there_is_not_is_told(wrong: dict[str, str], data: str, tiny: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        build(tiny, data_of("rte", data, tiny, 128), seed=0, **wrong)
