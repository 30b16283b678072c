"""A tiny encoder with its tokenizer, and tiny tasks in the folder's format, for the tests of the paper's runner."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

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
        return {"text": " ".join(words), "target": target, "label": number % 2 == 0}
    if task == "cb":
        label = ["entailment", "contradiction", "neutral"][number % 3]
        return {"premise": text(), "hypothesis": text(), "label": label}
    if task == "rte":
        return {"premise": text(), "hypothesis": text(), "label": ["entailment", "not_entailment"][number % 2]}
    label = round(rng.uniform(0, 5), 2) if task == "stsb" else str(number % 2)
    return {"text_a": text(), "text_b": text(), "label": label}


def write_tasks(folder: Path) -> str:
    """All seven tasks: 20 rows to train on, 6 and 7 to validate and test."""
    for task in ("cola", "stsb", "mrpc", "rte", "cb", "copa", "wsc"):
        rng = random.Random(task)
        (folder / task).mkdir(parents=True)
        for split, size in (("train", 20), ("val", 6), ("test", 7)):
            lines = [json.dumps(row(task, rng, number)) for number in range(size)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)
