"""Runs the Python blocks of the README and of `docs/`, page by page, and compares what they print with what is shown.

Each page starts with the same few names, made by `opening`, in an empty folder. A block of `text` after a block of
Python shows what that printed with the versions of constraints.txt: the words have to be the same, and the numbers
nearly, but for times.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
# they initialise heads, shuffle and add up in their own ways
DECIDING = [pin for pin in PINS if pin.name in ("torch", "transformers", "accelerate")]
NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(?! ?s\b)")
TIME = re.compile(r"\d[\d.]* s\b")


def opening(names: dict[str, Any]) -> None:
    """The quickstart's model and task, with few sentences: what every page's first lines would be."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from examples import tasks

    # or DeepSpeed, where it is installed, prints that it found none
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names["home"] = os.getcwd()
    names["folder"] = tempfile.TemporaryDirectory()
    os.chdir(names["folder"].name)
    path = tasks.default_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = tasks.tokenise(tasks.embedded_task(train_sentences=64, validation_sentences=8), tokenizer, max_length=64)
    collator = DataCollatorWithPadding(tokenizer)
    rows = task.train.remove_columns("token_type_ids")
    batches = [dict(collator([rows[i] for i in range(start, start + 8)])) for start in range(0, 32, 8)]
    names |= {
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "Trainer": Trainer,
        "path": path,
        "base_model": AutoModelForSequenceClassification.from_pretrained(path, num_labels=2),
        "tokenizer": tokenizer,
        "dataloader": batches,
        "train": task.train,
        "val": task.validation,
        "collator": collator,
        "args": TrainingArguments(
            output_dir="checkpoints",
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-3,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
    }


def closing(names: dict[str, Any]) -> None:
    """Back where the tests are run."""
    os.chdir(names["home"])
    names["folder"].cleanup()


def run(example: Example) -> None:
    """A block of Python, keeping what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    example.namespace["printed"] = printed.getvalue()


def compare(example: Example) -> None:
    """A block of text with what the last block of Python printed."""
    if others := [pin for pin in DECIDING if version(pin.name).partition("+")[0] not in pin.specifier]:
        pytest.skip(f"what is shown was printed with {', '.join(map(str, others))}")
    shown, printed = (TIME.sub("", text).split() for text in (example.parsed, example.namespace["printed"]))
    assert [NUMBER.sub("0", word) for word in shown] == [NUMBER.sub("0", word) for word in printed], printed
    for said, true in zip(shown, printed, strict=True):
        numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(word)] for word in (said, true)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05), (said, true)


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", run), CodeBlockParser("text", compare), SkipParser()],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md"],
    setup=opening,
    teardown=closing,
).pytest()
