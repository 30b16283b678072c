"""The paper's tasks and the examples' word order, as token numbers, and their metrics."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import tasks as known
from benchmarks.rig.special import SPECIAL, read

Row = dict[str, Any]

# The official training set of the Hub is split once, for all runs.
SPLIT_SEED, VALIDATION_SHARE = 0, 0.1
ORDER = "order"
# Sentences of the word-order task to train on, and those kept back: half to choose settings on, half to measure on.
TRAIN_SENTENCES, HELD_OUT_SENTENCES = 720, 480
TASKS = (*known.KNOWN, *SPECIAL, ORDER)


@dataclass(frozen=True)
class Data:
    """Rows to learn from, to choose settings on, and to measure on.

    Attributes:
        num_labels: outputs of the head: classes; 1 for a regression or a choice; 0 for a language model.
        metric: (outputs, labels) → scores by name, the headline first; larger is better.
        train, val, test: rows of `input_ids`, the tokenizer's other columns, and `labels`; those of a choice hold one
            list for each in a column, and those that compare two spans of a text have `spans`.
        answers: token numbers of the classes' names, where a language model answers with one of them.
        measured: on how many of the training rows the metric is measured, the same for all runs on the same rows.
    """

    num_labels: int
    regression: bool
    metric: Callable[[Any, Any], dict[str, float]]
    train: list[Row]
    val: list[Row]
    test: list[Row]
    answers: tuple[int, ...] = ()
    measured: int = 256


def load(name: str, source: str, tokenizer: Callable[..., Any], max_length: int) -> Data:
    """The task `name`: from the folder `source`, or from the Hub where that is "hub"; cut to `max_length`, not padded.

    A folder has `<name>/train.jsonl`, `val.jsonl` and `test.jsonl`. Of the Hub's, the official validation split is
    the test, and a seeded tenth of the official training split the validation. The examples' word order needs neither.

    Raises:
        ValueError: for a task that is not known.
        FileNotFoundError: for a folder without it.
    """
    if name not in TASKS:
        raise ValueError(f"Expected a task of {list(TASKS)}, got {name!r}: choose one of these.")
    if name in SPECIAL:
        rows, special = read(name, source), SPECIAL[name]
        encoded = {split: [special.encode(row, tokenizer, max_length) for row in of] for split, of in rows.items()}
        train, val = (encoded["train"], encoded["val"]) if "val" in encoded else hold_out(encoded["train"])
        return Data(special.outputs, False, known.accuracy, train, val, encoded["test"])
    if name == ORDER:
        texts = known.embedded_task(train_sentences=TRAIN_SENTENCES, validation_sentences=HELD_OUT_SENTENCES)
    else:
        texts = known.hub_task(name) if source == "hub" else known.folder_task(source, name)
    task = known.tokenise(texts, tokenizer, max_length)
    train, test = task.train.to_list(), task.validation.to_list()
    if name == ORDER:
        val, test = test[:HELD_OUT_SENTENCES], test[HELD_OUT_SENTENCES:]  # a sentence and its twin stay together
    elif task.tuning is not None:
        val = task.tuning.to_list()
    elif source == "hub":
        train, val = hold_out(train)
    else:
        raise FileNotFoundError(f"Expected the file {Path(source, name, 'val.jsonl')}, found none: put it there.")
    return Data(task.num_labels, task.problem == "regression", task.metric, train, val, test)


def hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Nine tenths and one, by a seed that is the same for all runs."""
    order = random.Random(SPLIT_SEED).sample(range(len(rows)), len(rows))
    held_out = set(order[: max(1, round(VALIDATION_SHARE * len(rows)))])
    kept = [row for number, row in enumerate(rows) if number not in held_out]
    return kept, [row for number, row in enumerate(rows) if number in held_out]


def without(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows but a random `share` of them, which each seed chooses anew; in their order."""
    dropped = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    return [row for number, row in enumerate(rows) if number not in dropped]
