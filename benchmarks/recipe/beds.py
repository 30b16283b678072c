"""The test beds: what is trained on what, and the methods that are compared there at equal size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.rig.language import DOCS
from benchmarks.rig.tasks import ORDER

# The seed of the grid of learning rates; results are of other seeds.
GRID_SEED = 0
LRS = [3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 3e-2]
# rank of pairs beside random entries → their options; α is 8 where nothing is said
PAIRS = {1: "r=1,scale=8", 2: "r=2,alpha=4,scale=3", 4: "r=4,scale=3"}


@dataclass(frozen=True)
class Bed:
    """One row of the table of test beds.

    Attributes:
        run: fields of `Run` for all methods: they are the bed.
        ranks: of LoRA, whose numbers of trained entries are the sizes.
        density: share of the linear layers' entries that LoRA of rank 1 trains.
        batches: on how many batches a gradient is summed to choose entries.
        rehearsal: dense steps of the score "movement".
    """

    run: dict[str, Any]
    ranks: tuple[int, ...]
    density: float
    batches: int
    rehearsal: int


def _language(steps: int, **rest: Any) -> Bed:
    run = {"model": "smollm2", "task": DOCS, "steps": steps, "eval_every": steps, "batch": 4, "max_length": 64}
    return Bed({**run, "warmup": 0.05, "schedule": "cosine", **rest}, (2, 8), 0.002875, 16, 40)


def _encoder(task: str, steps: int) -> Bed:
    run = {"model": "minilm", "task": task, "steps": steps, "eval_every": 100, "batch": 16, "max_length": 64}
    return Bed({**run, "pooling": "mean", "dropout": 0.0, "head_lr": 1e-3}, (1, 4), 0.0039, 128, 400)


BEDS = {
    "docs": _language(100),  # of the documentation's 1,260 blocks 400, each once
    "docs-three-epochs": _language(120, drop=0.873),  # 160 blocks, each three times
    "stsb-as-text": _language(150, task="stsb-as-text", batch=8, max_length=144, precision="bf16"),
    "cola": _encoder("cola", 800),
    "stsb": _encoder("stsb", 300),
    "order": _encoder(ORDER, 270),
}


def methods(bed: Bed, rank: int) -> list[str]:
    """LoRA of a rank and the others with as many trained entries, as `benchmarks.rig.methods` writes them.

    Beside pairs of half the rank random values take three times the run's rate: the ratio of the best rates of each
    alone; r = 1 was run at eight times. Of LoRA's α, 8 was best at small ranks and 2 r at r = 8.
    """
    density, batches = f"density={bed.density * rank:.6g}", f"max_batches={bed.batches}"
    alone = [
        f"lora:r={rank}" + f",alpha={2 * rank}" * (rank > 4),
        f"random:{density}",
        f"sam:{density},{batches}",
        f"movement:{density},max_batches={bed.rehearsal}",
    ]
    if rank == 1:
        return alone
    return [*alone, f"hybrid:density={bed.density * rank / 2:.6g},{PAIRS[rank // 2]}"]
