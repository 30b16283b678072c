"""One run: what identifies it, carrying it out, and its line of results."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import random
import resource
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import peft_sam
from benchmarks.common import environment
from benchmarks.rig.batches import Batches, in_order
from benchmarks.rig.loop import Recipe, evaluate, train
from benchmarks.rig.method import mean_loss, named_head
from benchmarks.rig.methods import OF_THE_RUN, parse
from benchmarks.rig.models import build, setup_of, where_is
from benchmarks.rig.tasks import Row, encoded_task, without
from peft_sam.choosing.dense import train_densely

EVALUATION_BATCH = 64
# The training metric is measured on at most so many rows, the same for all runs on the same rows.
TRAIN_ROWS = 256


@dataclass(frozen=True)
class Run:
    """Everything that a result depends on, apart from the machine.

    Attributes:
        method: as `methods.Spec.text` writes it.
        source: "hub" or "folder", whose splits differ.
        drop: share of the training rows that each seed leaves out.
        pooling, precision, dropout: as in `models`.
        the others: as in `Setup`, `Recipe` and `methods.OF_THE_RUN`.
    """

    model: str
    task: str
    method: str
    seed: int
    lr: float
    steps: int
    density: float = 0.005
    candidates: str = "linear"
    source: str = "folder"
    drop: float = 0.0
    pooling: str = "first"
    precision: str = "fp32"
    dropout: float | None = None
    max_length: int = 128
    batch: int = 16
    head_lr: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    eval_every: int = 50
    patience: int = 10
    seconds: float | None = None

    @property
    def key(self) -> str:
        """A short name that no other run has."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def recipe(self) -> Recipe:
        """What the loop needs of it."""
        mine = asdict(self)
        return Recipe(**{field.name: mine[field.name] for field in fields(Recipe) if field.name in mine})


def default_device() -> str:
    """Where runs happen."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def execute(run: Run, source: str, curve: bool = False) -> dict[str, Any]:
    """Carry out a run; returns its line.

    Args:
        source: the folder of the tasks, or "hub".
        curve: record the loss of each step.
    """
    device, spec = default_device(), parse(run.method)
    options = {**OF_THE_RUN, **spec.of_the_run}
    peak = PeakMemory(device)
    start, cpu = time.perf_counter(), time.process_time()
    task = encoded_task(run.task, source, where_is(run.model), run.max_length)
    rows = without(task.train, run.drop, run.seed)
    model: Any = build(run.model, task, run.pooling, run.seed, run.precision, run.dropout).to(device)
    padding = model.body.config.pad_token_id or 0

    def batches(offset: int) -> Batches:
        return Batches(rows, run.batch, run.seed + offset, padding, device)

    def measure(model: nn.Module, rows: list[Row]) -> tuple[dict[str, float], float]:
        return evaluate(model, in_order(rows, EVALUATION_BATCH, padding, device), task.metric)

    setup = setup_of(
        model,
        batches(1_000_000),
        density=run.density if options["density"] is None else options["density"],
        seed=run.seed,
        steps=run.steps,
        candidates=options["candidates"] or run.candidates,
        exclude=options["exclude"],
    )
    loaded = time.perf_counter()
    if options["head_warmup"]:
        train_densely(
            model,
            dict(named_head(model, setup)),
            batches(2_000_000),
            mean_loss(model),
            what="Head warm-up",
            steps=options["head_warmup"],
            lr=options["head_warmup_lr"],
            progress=False,
        )
    method = spec.make()
    model = method.start(model, setup)
    for _, parameter in named_head(model, setup):
        parameter.requires_grad_(True)
    torch.manual_seed(run.seed)
    started = time.perf_counter()
    found = train(model, method, setup, run.recipe(), batches(0), lambda model: measure(model, task.val))
    final = time.perf_counter()
    train_rows = random.Random(0).sample(rows, min(TRAIN_ROWS, len(rows)))
    train_scores, train_loss = measure(model, train_rows)
    test_scores, test_loss = measure(model, task.test)
    line = {
        "key": run.key,
        "config": asdict(run),
        "val": found.best,
        "test": test_scores,
        "train": train_scores,
        "loss": {"val": found.best_loss, "test": test_loss, "train": train_loss},
        "best_step": found.best_step,
        "steps": found.steps,
        "stopped": found.stopped,
        "trained": method.trained(model, setup),
        "head": sum(parameter.numel() for _, parameter in named_head(model, setup)),
        "stored_bytes": method.stored_bytes(model, setup),
        "seconds": {
            "loading": loaded - start,
            "selection": started - loaded,
            "training": found.training,
            "validation": found.evaluation,
            "measuring": time.perf_counter() - final,
            "all": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
        },
        "peak_bytes": peak.read(),
        "rows": {"train": len(rows), "val": len(task.val), "test": len(task.test)},
        "history": found.history,
        "environment": {**environment(device), "peft": peft.__version__, "peft_sam": peft_sam.__version__},
    }
    return {**line, "curve": found.losses} if curve else line


class PeakMemory:
    """The most memory that was taken since it was made: of the process, or of the GPU by this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the high-water mark

    def read(self) -> int:
        """In bytes. Where the system keeps one high-water mark for the whole process, that one."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
