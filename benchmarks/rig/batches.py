"""Batches of rows of similar length, in an order that a seed shuffles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.rig.tasks import Row

# Rows are sorted by length within so many batches, so that batches differ from epoch to epoch.
BUCKET = 32
# How far a length may be taken for a longer or a shorter one, for the same end where one bucket holds all rows.
JITTER = 0.1
# Columns that are of the same size in every row.
_WHOLE = {"labels", "spans"}


class Batches:
    """Padded batches; each time they are read, all rows in another order, the same for the same seed and epoch."""

    def __init__(self, rows: Sequence[Row], size: int, seed: int, padding: int, device: str = "cpu") -> None:
        if not rows:
            raise ValueError("there are no rows to make batches of.")
        self.rows, self.size, self.seed, self.padding, self.device = rows, size, seed, padding, device
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        self.epoch += 1
        order = rng.sample(range(len(self.rows)), len(self.rows))
        found = []
        for start in range(0, len(order), BUCKET * self.size):
            bucket = order[start : start + BUCKET * self.size]
            keys = {n: length_of(self.rows[n]) * rng.uniform(1 - JITTER, 1 + JITTER) for n in bucket}
            bucket.sort(key=keys.__getitem__)
            found += [bucket[at : at + self.size] for at in range(0, len(bucket), self.size)]
        rng.shuffle(found)
        for numbers in found:
            yield collate([self.rows[n] for n in numbers], self.padding, self.device)


def in_order(rows: Sequence[Row], size: int, padding: int, device: str = "cpu") -> Iterator[dict[str, Tensor]]:
    """All rows once, the longest first."""
    ordered = sorted(rows, key=length_of, reverse=True)
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], padding, device)


def length_of(row: Row) -> int:
    """Tokens of a row, or of the longer of its choices."""
    ids = row["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def collate(rows: Sequence[Row], padding: int, device: str = "cpu") -> dict[str, Tensor]:
    """One batch: token columns padded at the right to (rows, tokens) or (rows, choices, tokens), labels and spans."""
    length, choices = max(map(length_of, rows)), isinstance(rows[0]["input_ids"][0], list)
    batch = {name: torch.tensor([row[name] for row in rows], device=device) for name in _WHOLE & rows[0].keys()}
    for name in rows[0].keys() - _WHOLE:
        value = padding if name == "input_ids" else 0
        lines = [line for row in rows for line in (row[name] if choices else [row[name]])]
        table = torch.tensor([line + [value] * (length - len(line)) for line in lines], device=device)
        batch[name] = table.view(len(rows), -1, length) if choices else table
    return batch
