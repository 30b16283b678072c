"""Lines of results as the rig writes them, for the tests of tables and figures."""

from __future__ import annotations

from typing import Any


def line(method: str, task: str, seed: int, lr: float, val: float, test: float, **config: Any) -> dict[str, Any]:
    common = {"model": "tiny", "steps": 10, "eval_every": 5, "density": 0.005, "drop": 0.0, "dropout": None}
    return {
        "config": {**common, "method": method, "task": task, "seed": seed, "lr": lr, **config},
        "val": {"accuracy": val},
        "test": {"accuracy": test},
        "train": {"accuracy": val / 2},
        "loss": {"val": 1.0},
        "trained": 1234,
        "stored_bytes": 2048,
        "seconds": {"selection": 1.5, "training": 2.0},
        "steps": 8,
        "peak_bytes": 3 * 2**20,
    }


LINES = [
    line("full", "rte", 0, 0.1, 0.9, 0.1),  # the grid: the best test is not the best validation
    line("full", "rte", 0, 0.2, 0.8, 0.99),
    line("full", "rte", 1, 0.1, 0.2, 0.3),
    line("full", "cb", 0, 0.2, 0.5, 0.5),
    line("full", "cb", 1, 0.2, 0.5, 0.7),
    line("sam", "rte", 0, 0.3, 0.5, 0.2),
    line("sam", "rte", 1, 0.3, 0.5, 0.2),
    line("sam", "cb", 0, 0.3, 0.5, 0.65),
    line("sam", "cb", 1, 0.3, 0.5, 0.65),
    line("lora", "cb", 0, 0.3, 0.5, 0.5),
]
