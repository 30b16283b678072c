"""The paper's seven tasks: their texts, from a folder or the Hub, as token numbers with labels and a metric."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.common import tasks as known

Row = dict[str, Any]

# The official training set of the Hub is split once, for all runs.
SPLIT_SEED, VALIDATION_SHARE = 0, 0.1
# What COPA asks, between the premise and the choices, as in jiant.
QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


@dataclass(frozen=True)
class PaperTask:
    """Rows to learn from, to choose settings on, and to measure on.

    Attributes:
        kind: "texts" (one text or two → a class or a number), "choices" (the right one of two texts) or "spans"
            (whether two spans of a text mean the same).
        num_labels: classes; 1 for a regression.
        metric: (outputs, labels) → scores by name, the paper's first.
        train, val, test: rows; encoded ones hold `input_ids`, the tokenizer's other columns, `labels`, and `spans` for
            the kind "spans": (first, last + 1) in tokens, twice.
    """

    name: str
    kind: str
    num_labels: int
    regression: bool
    metric: Callable[[Any, Any], dict[str, float]]
    train: list[Row]
    val: list[Row]
    test: list[Row]


def load(name: str, source: str) -> PaperTask:
    """The task `name` with texts: from the folder `source`, or from the Hub where that is "hub".

    A folder has `<name>/train.jsonl`, `val.jsonl` and `test.jsonl`. Of the Hub's, the official validation split is
    the test, and a seeded tenth of the official training split the validation.

    Raises:
        ValueError: for a task that is not one of the seven.
        FileNotFoundError: for a folder without it.
    """
    if name not in TASKS:
        raise ValueError(f"Expected a task of {list(TASKS)}, got {name!r}: choose one of these.")
    return _of_texts(name, source) if name in known.KNOWN else _of_rows(name, source, **SPECIAL[name])


def _of_texts(name: str, source: str) -> PaperTask:
    """One of the tasks that the examples know too."""
    task = known.hub_task(name) if source == "hub" else known.folder_task(source, name)
    train = task.train.to_list()
    if source != "hub" and task.tuning is None:
        raise FileNotFoundError(f"Expected the file {Path(source, name, 'val.jsonl')}, found none: put it there.")
    train, val = _hold_out(train) if task.tuning is None else (train, task.tuning.to_list())
    regression = task.problem == "regression"
    return PaperTask(name, "texts", task.num_labels, regression, task.metric, train, val, task.validation.to_list())


def _of_rows(name: str, source: str, kind: str, hub: str, labels: int, read: Callable[[Row], Row]) -> PaperTask:
    if source == "hub":
        splits = known.load_dataset("aps/super_glue", hub)
        train, val = _hold_out(splits["train"].to_list())
        test = splits["validation"].to_list()
    else:
        train, val, test = (
            known.read_lines(Path(source, name, f"{split}.jsonl")) for split in ("train", "val", "test")
        )
    train, val, test = ([read(row) for row in rows] for rows in (train, val, test))
    return PaperTask(name, kind, labels, False, known.accuracy, train, val, test)


def _hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Nine tenths and one, by a seed that is the same for all runs."""
    order = random.Random(SPLIT_SEED).sample(range(len(rows)), len(rows))
    held_out = set(order[: max(1, round(VALIDATION_SHARE * len(rows)))])
    kept = [row for number, row in enumerate(rows) if number not in held_out]
    return kept, [row for number, row in enumerate(rows) if number in held_out]


def _copa(row: Mapping[str, Any]) -> Row:
    texts = [f"{row['premise']} {QUESTIONS[row['question']]}"] * 2
    return {"text_a": texts, "text_b": [row["choice1"], row["choice2"]], "label": int(row["label"])}


def _wsc(row: Mapping[str, Any]) -> Row:
    """The text, and where its two spans are in it, in characters."""
    words = [(match.start(), match.end()) for match in re.finditer(r"\S+", row["text"])]
    target, spans = row.get("target", row), []
    for number in (1, 2):
        first, length = target[f"span{number}_index"], len(target[f"span{number}_text"].split())
        spans.append((words[first][0], words[min(first + length, len(words)) - 1][1]))
    return {"text": row["text"], "spans": spans, "label": int(row["label"])}


# Tasks that are no texts with a class: how many outputs a row (a choice) gets, and how rows are read.
SPECIAL: dict[str, dict[str, Any]] = {
    "copa": {"kind": "choices", "hub": "copa", "labels": 1, "read": _copa},
    "wsc": {"kind": "spans", "hub": "wsc.fixed", "labels": 2, "read": _wsc},
}
TASKS = ("cola", "stsb", "mrpc", "rte", "cb", "copa", "wsc")


def encode(task: PaperTask, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PaperTask:
    """The task with token numbers in place of texts, cut to `max_length`, not padded."""
    if task.kind == "choices":
        return _map(task, lambda row: _encode_choices(row, tokenizer, max_length))
    return _map(task, lambda row: _encode_text(row, tokenizer, max_length))


def _map(task: PaperTask, function: Callable[[Row], Row]) -> PaperTask:
    train, val, test = ([function(row) for row in rows] for rows in (task.train, task.val, task.test))
    return replace(task, train=train, val=val, test=test)


def _encode_text(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    texts = [row["text"]] if "text" in row else [row["text_a"], row["text_b"]]
    spans = row.get("spans")
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_offsets_mapping=spans is not None)
    found = {**encoded, "labels": row["label"]}
    if spans is not None:
        offsets = found.pop("offset_mapping")
        found["spans"] = [_tokens_of(span, offsets, row["text"]) for span in spans]
    return found


def _tokens_of(span: tuple[int, int], offsets: Sequence[tuple[int, int]], text: str) -> tuple[int, int]:
    """The first token that holds a character of the span, and one after the last."""
    inside = [n for n, (start, stop) in enumerate(offsets) if start < span[1] and stop > span[0]]
    if not inside:
        raise ValueError(f"the span {text[slice(*span)]!r} of {text!r} is cut off: use a larger --max-length.")
    return inside[0], inside[-1] + 1


def _encode_choices(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    encoded = tokenizer(row["text_a"], row["text_b"], truncation=True, max_length=max_length)
    return {**encoded, "labels": row["label"]}


@functools.cache
def encoded_task(name: str, source: str, tokenizer_name: str, max_length: int) -> PaperTask:
    """`load` and `encode`, once per process."""
    from transformers import AutoTokenizer

    return encode(load(name, source), AutoTokenizer.from_pretrained(tokenizer_name), max_length)


def without(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows but a random `share` of them, which each seed chooses anew; in their order."""
    dropped = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    return [row for number, row in enumerate(rows) if number not in dropped]
