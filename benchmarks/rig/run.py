"""One run: what identifies it, carrying it out, and its line of results."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, fields
from typing import Any

import peft
import torch
from torch import nn

import peft_sam
from benchmarks.common import environment
from benchmarks.rig.batches import Batches, in_order
from benchmarks.rig.clock import Clock, PeakMemory
from benchmarks.rig.loop import Recipe, evaluate, train
from benchmarks.rig.method import Setup, mean_loss, named_head
from benchmarks.rig.methods import OF_THE_RUN, parse
from benchmarks.rig.models import HEAD, build, candidate_modules, data_of
from benchmarks.rig.tasks import Row, without
from peft_sam.choosing.dense import train_densely

# Rows of a batch of an evaluation: of classes, and of running text, whose outputs are as wide as a vocabulary.
EVALUATION_BATCH, LANGUAGE_BATCH = 64, 8
HEAD_WARMUP_LR = 1e-3


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
    schedule: str | None = None
    weight_decay: float = 0.0
    eval_every: int = 50
    patience: int = 10

    @property
    def key(self) -> str:
        """A short name that no other run has. A field that is added later changes it only away from its default."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {field.name: told[field.name] for field in fields(self) if told[field.name] != field.default}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def recipe(self) -> Recipe:
        """What the loop needs of it."""
        mine = asdict(self)
        return Recipe(**{field.name: mine[field.name] for field in fields(Recipe) if field.name in mine})


def execute(run: Run, source: str, curve: bool = False) -> dict[str, Any]:
    """Carry out a run; returns its line.

    Args:
        source: the folder of the tasks, or "hub".
        curve: record the loss of each step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec, peak, clock = parse(run.method), PeakMemory(device), Clock(device)
    options = {**OF_THE_RUN, **spec.of_the_run}
    with clock.part("loading"):
        task = data_of(run.task, source, run.model, run.max_length)
        rows = without(task.train, run.drop, run.seed)
        model: Any = build(run.model, task, run.pooling, run.seed, run.precision, run.dropout).to(device)
        padding = model.body.config.pad_token_id or 0

    def batches(offset: int) -> Batches:
        return Batches(rows, run.batch, run.seed + offset, padding, device)

    def measure(model: nn.Module, rows: list[Row]) -> tuple[dict[str, float], float]:
        size = EVALUATION_BATCH if task.num_labels or task.answers else LANGUAGE_BATCH
        return evaluate(model, in_order(rows, size, padding, device), task.metric)

    setup = Setup(
        density=run.density if options["density"] is None else options["density"],
        seed=run.seed,
        steps=run.steps,
        lr=run.lr,
        batches=batches(1_000_000),
        head=HEAD,
        candidates=candidate_modules(model, options["candidates"] or run.candidates),
    )
    method = spec.make()
    with clock.part("selection"):
        if options["head_warmup"]:
            train_densely(
                model,
                dict(named_head(model, setup)),
                batches(2_000_000),
                mean_loss(model),
                what="Head warm-up",
                steps=options["head_warmup"],
                lr=HEAD_WARMUP_LR,
                progress=False,
            )
        model = method.start(model, setup)
        for _, parameter in named_head(model, setup):
            parameter.requires_grad_(True)
    torch.manual_seed(run.seed)
    with clock.part("training"):
        found = train(model, method, setup, run.recipe(), batches(0), lambda m: measure(m, task.val), clock)
    with clock.part("measuring"):
        train_rows = random.Random(0).sample(rows, min(task.measured, len(rows)))
        scores, losses = {}, {"val": found.best_loss}
        for split, of in (("test", task.test), ("train", train_rows)):
            scores[split], losses[split] = measure(model, of)
    line = {
        "key": run.key,
        "config": asdict(run),
        "val": found.best,
        **scores,
        "loss": losses,
        "best_step": found.best_step,
        "steps": found.steps,
        "stopped": found.stopped,
        "trained": method.trained(model, setup),
        "head": sum(parameter.numel() for _, parameter in named_head(model, setup)),
        "stored_bytes": method.stored_bytes(model, setup),
        **clock.seconds(),
        "peak_bytes": peak.read(),
        "rows": {"train": len(rows), "val": len(task.val), "test": len(task.test)},
        "history": found.history,
        "environment": {**environment(device), "peft": peft.__version__, "peft_sam": peft_sam.__version__},
    }
    return {**line, "curve": found.losses} if curve else line
