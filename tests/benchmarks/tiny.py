"""Tiny models with their tokenizer, and tiny tasks in the folder's format, for the tests of the rig."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

WORDS = ("a", "the", "cat", "dog", "sat", "ran", "on", "under", "mat", "did", "not", "because", "it", "was", "big")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]


def write_model(folder: Path) -> str:
    """A BERT of two layers of width 16 and a tokenizer that knows WORDS."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def write_language_model(folder: Path) -> str:
    """A Llama of two layers of width 16 and a tokenizer that knows single characters."""
    folder.mkdir(parents=True)
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*SPECIAL[:5], *characters, *(f"##{character}" for character in characters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def row(task: str, rng: random.Random, number: int) -> dict[str, Any]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))

    if task == "cola":
        return {"text": text(), "label": str(number % 2)}
    if task == "copa":
        question = rng.choice(["cause", "effect"])
        return {"premise": text(), "question": question, "choice1": text(), "choice2": text(), "label": number % 2}
    if task == "wsc":
        words = text().split()
        target = {"span1_index": 1, "span1_text": " ".join(words[1:3]), "span2_index": 3, "span2_text": words[3]}
        words[0], words[2] = f"{words[0]}.", f"{words[2]}."  # words of more than one token, before and in a span
        return {"text": " ".join(words), "target": target, "label": number % 2 == 0}
    if task == "cb":
        label = ["entailment", "contradiction", "neutral"][number % 3]
        return {"premise": text(), "hypothesis": text(), "label": label}
    if task == "rte":
        return {"premise": text(), "hypothesis": text(), "label": ["entailment", "not_entailment"][number % 2]}
    label = round(rng.uniform(0, 5), 2) if task == "stsb" else str(number % 2)
    return {"text_a": text(), "text_b": text(), "label": label}


def write_tasks(folder: Path) -> str:
    """The paper's seven tasks: 20 rows to train on, 6 and 7 to validate and test."""
    for task in HUB:
        rng = random.Random(task)
        (folder / task).mkdir(parents=True)
        for split, size in (("train", 20), ("val", 6), ("test", 7)):
            lines = [json.dumps(row(task, rng, number)) for number in range(size)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


# Task → the Hub's dataset, its names of the folder's columns, and its classes in their order.
HUB: dict[str, tuple[tuple[str, str], dict[str, str], list[str]]] = {
    "cola": (("nyu-mll/glue", "cola"), {"text": "sentence"}, ["unacceptable", "acceptable"]),
    "stsb": (("nyu-mll/glue", "stsb"), {"text_a": "sentence1", "text_b": "sentence2"}, []),
    "mrpc": (("nyu-mll/glue", "mrpc"), {"text_a": "sentence1", "text_b": "sentence2"}, ["no", "yes"]),
    "rte": (
        ("nyu-mll/glue", "rte"),
        {"premise": "sentence1", "hypothesis": "sentence2"},
        ["entailment", "not_entailment"],
    ),
    "cb": (("aps/super_glue", "cb"), {}, ["entailment", "contradiction", "neutral"]),
    "copa": (("aps/super_glue", "copa"), {}, ["choice1", "choice2"]),
    "wsc": (("aps/super_glue", "wsc.fixed"), {}, ["False", "True"]),
}


def hub_splits(task: str, folder: str) -> DatasetDict:
    """The rows of a folder as the Hub has them: what is held out there is in train here, and test has no labels."""
    _, columns, classes = HUB[task]

    def convert(split: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in Path(folder, task, f"{split}.jsonl").read_text().splitlines()]
        found = []
        for number, row in enumerate(rows):
            label = row.pop("label")
            if classes:
                label = classes.index(label) if label in classes else int(label)
            flat = {**row.pop("target", {}), **row}
            found.append({**{columns.get(k, k): v for k, v in flat.items()}, "idx": number, "label": label})
        return found

    splits = {"train": convert("train") + convert("val"), "validation": convert("test")}
    splits["test"] = [{**row, "label": -1} for row in splits["validation"]]
    made = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    return made.cast_column("label", ClassLabel(names=classes)) if classes else made
