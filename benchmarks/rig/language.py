"""What a language model learns: Python's documentation, beside other English that is to be kept; a task as text."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.common import tasks as known
from benchmarks.rig import tasks
from benchmarks.rig.tasks import Data, Row

DOCS = "docs"
SPLIT_SEED = 0
# Blocks of held-out topics in the validation rows and in the test rows, and of other text in the test rows.
HELD_OUT = (64, 128, 64)
# What the labels of the rows say.
DOCUMENTATION, OTHER = 0, 1


def log_likelihoods(outputs: Any, labels: Any) -> dict[str, float]:
    """Mean log-likelihood of a token, in nats, of the documentation and of the other text, where there is some."""
    values, kinds = np.asarray(outputs), np.asarray(labels)
    found = {"documentation": DOCUMENTATION, "other": OTHER}
    return {name: float(values[kinds == kind].mean()) for name, kind in found.items() if (kinds == kind).any()}


def load(
    source: str, tokenizer: PreTrainedTokenizerBase, length: int, held_out: tuple[int, int, int] = HELD_OUT
) -> Data:
    """Blocks of `length` tokens of `help("topics")`; validation and test are of topics that are not trained on.

    Args:
        source: the folder, or "hub", whose RTE premises (of its development set) are the other text of the test rows.
    """
    names = sorted(topics)
    random.Random(SPLIT_SEED).shuffle(names)
    splits: list[list[Row]] = []
    for wanted in held_out[:2]:
        rows: list[Row] = []
        while len(rows) < wanted:
            rows += blocks(topics[names.pop()], tokenizer, length, DOCUMENTATION)
        splits.append(rows[:wanted])
    val, test = splits
    train = blocks("\n\n".join(topics[name] for name in names), tokenizer, length, DOCUMENTATION)
    task = known.hub_task("rte") if source == "hub" else known.folder_task(source, "rte")
    premises = "\n\n".join(dict.fromkeys(task.validation["text_a"]))
    other = blocks(premises, tokenizer, length, OTHER)[: held_out[2]]
    return Data(0, False, log_likelihoods, train, val, test + other, measured=32)


def blocks(text: str, tokenizer: PreTrainedTokenizerBase, length: int, kind: int) -> list[Row]:
    """The text's tokens in whole blocks."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[at : at + length], "attention_mask": [1] * length, "labels": kind} for at in starts]


class Prompt(NamedTuple):
    """A task whose classes are the likelier of some words after one text or two.

    Attributes:
        cut: of a task of scores, the least that the second answer is right for.
    """

    task: str
    text: str
    answers: tuple[str, ...]
    cut: float | None = None


PROMPTS = {
    "stsb-as-text": Prompt("stsb", "{}\n{}\nDo these two say the same? Answer:", (" No", " Yes"), cut=3.0),
}


def ask(name: str, source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Data:
    """The rows of a task as prompts, and the answers that its classes are.

    Raises:
        ValueError: if the tokenizer makes more than one token of an answer, or a prompt is too long.
    """
    prompt = PROMPTS[name]
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in prompt.answers]
    if any(len(answer) != 1 for answer in answers):
        raise ValueError(f"Expected one token for each of {prompt.answers}, got {answers}: choose other words.")

    def encode(*texts: Iterable[str], **_: Any) -> Any:
        found = tokenizer([prompt.text.format(*row) for row in zip(*texts, strict=True)])
        longest = max(map(len, found["input_ids"]))
        if longest > max_length:
            raise ValueError(f"a prompt has {longest} tokens: use a larger --max-length than {max_length}.")
        return found

    classes = tasks.load(prompt.task, source, encode, max_length)
    if prompt.cut is not None:
        train, val, test = (
            [{**row, "labels": int(row["labels"] >= prompt.cut)} for row in of]
            for of in (classes.train, classes.val, classes.test)
        )
        classes = replace(classes, regression=False, metric=known.accuracy, train=train, val=val, test=test)
    return replace(classes, num_labels=0, answers=tuple(answer[0] for answer in answers), measured=64)
