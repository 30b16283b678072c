"""COPA and WSC, which are no texts with a class: which of two texts is right; whether two spans mean the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import tasks as known

# What COPA asks, between the premise and the choices, as in jiant (github.com/nyu-mll/jiant).
QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def choices(row: Mapping[str, Any], tokenizer: Callable[..., Any], max_length: int) -> dict[str, Any]:
    """COPA's row: the tokenizer's columns hold one list for each choice, read after premise and question."""
    asked = f"{row['premise']} {QUESTIONS[row['question']]}"
    texts = [asked, asked], [row["choice1"], row["choice2"]]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": int(row["label"])}


def spans(row: Mapping[str, Any], tokenizer: Callable[..., Any], max_length: int) -> dict[str, Any]:
    """WSC's row, with `spans`: (first, last + 1) in tokens, twice; the source has them as numbers of words.

    Raises:
        ValueError: for a span that lies behind the tokens that are kept.
    """
    words = [match.span() for match in re.finditer(r"\S+", row["text"])]
    target, places = row.get("target", row), []
    encoded = tokenizer(row["text"], truncation=True, max_length=max_length, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    for number in (1, 2):
        first, length = target[f"span{number}_index"], len(target[f"span{number}_text"].split())
        place = words[first][0], words[min(first + length, len(words)) - 1][1]
        places.append(_tokens_of(place, offsets, row["text"]))
    return {**encoded, "spans": places, "labels": int(row["label"])}


def _tokens_of(place: tuple[int, int], offsets: Sequence[tuple[int, int]], text: str) -> tuple[int, int]:
    """The first token that holds a character of the span, and one after the last."""
    inside = [n for n, (start, stop) in enumerate(offsets) if start < place[1] and stop > place[0]]
    if not inside:
        raise ValueError(f"the span {text[slice(*place)]!r} of {text!r} is cut off: use a larger --max-length.")
    return inside[0], inside[-1] + 1


class Special(NamedTuple):
    """A row of the table: the Hub's name within SuperGLUE, how a row is encoded, and how many outputs a text has."""

    hub: str
    encode: Callable[[Mapping[str, Any], Callable[..., Any], int], dict[str, Any]]
    outputs: int


SPECIAL = {"copa": Special("copa", choices, 1), "wsc": Special("wsc.fixed", spans, 2)}


def read(name: str, source: str) -> dict[str, list[dict[str, Any]]]:
    """The rows as their source has them, by split; the Hub has no "val"."""
    if source == "hub":
        splits = known.load_dataset("aps/super_glue", SPECIAL[name].hub)
        return {"train": splits["train"].to_list(), "test": splits["validation"].to_list()}
    return {split: known.read_lines(Path(source, name, f"{split}.jsonl")) for split in ("train", "val", "test")}
