"""The one training loop: AdamW, warm-up and decay, early stopping on validation, the best model kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from benchmarks.rig.clock import Clock
from benchmarks.rig.method import Method, Setup, named_head
from peft_sam.choosing.dense import endless

Metric = Callable[[Any, Any], dict[str, float]]
Evaluate = Callable[[nn.Module], tuple[dict[str, float], float]]


@dataclass(frozen=True)
class Recipe:
    """How every method is trained.

    Attributes:
        lr: peak learning rate; grows over the first `warmup` of `steps` and then falls to zero, as `schedule` says.
        head_lr: of the head; None for `lr`.
        schedule: a name that transformers knows; None for linear.
        eval_every, patience: validate each so many steps; stop after so many validations without a better one.
    """

    lr: float
    steps: int
    head_lr: float | None = None
    warmup: float = 0.06
    schedule: str | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 50
    patience: int = 10


@dataclass
class Trained:
    """What came of it.

    Attributes:
        best: validation scores of the model that was kept, and its mean loss.
        best_step, steps: the step that it is from, and how many there were.
        stopped: "steps", "patience" or "diverged".
        history: (step, validation score, validation loss) each time.
        losses: of each step, the penalty left out.
    """

    best: dict[str, float] = field(default_factory=dict)
    best_loss: float = float("inf")
    best_step: int = 0
    steps: int = 0
    stopped: str = "steps"
    history: list[tuple[int, float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict[str, Tensor]], metric: Metric) -> tuple[dict[str, float], float]:
    """The metric's scores and the mean loss, in eval mode."""
    model.eval()
    outputs, labels, losses = [], [], 0.0
    for batch in batches:
        found = model(**batch)
        outputs.append(found.logits.float().cpu().numpy())
        labels.append(batch["labels"].cpu().numpy())
        losses += float(found.loss) * len(labels[-1])
    every, truth = np.concatenate(outputs), np.concatenate(labels)
    return metric(every, truth), losses / len(truth)


class Best:
    """The state of the best model so far: what is trained, and buffers."""

    def __init__(self) -> None:
        self.key: tuple[float, float] = (-float("inf"), 0.0)
        self.state: dict[str, Tensor] = {}

    @staticmethod
    def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        yield from model.named_buffers()

    def offer(self, model: nn.Module, score: float, loss: float) -> bool:
        """Keep the model if its score is higher, or the same with a smaller loss; says whether."""
        if (score, -loss) <= self.key:
            return False
        self.key = (score, -loss)
        self.state = {name: tensor.detach().clone() for name, tensor in self._tensors(model)}
        return True

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the kept state back."""
        for name, tensor in self._tensors(model):
            if name in self.state:
                tensor.copy_(self.state[name])


def parameter_groups(method: Method, model: nn.Module, setup: Setup, recipe: Recipe) -> list[dict[str, Any]]:
    """The method's groups, with the head in one of its own where it has a learning rate of its own."""
    groups = method.groups(model, recipe.lr)
    if recipe.head_lr is None:
        return groups
    head = [parameter for _, parameter in named_head(model, setup)]
    known = {id(parameter) for parameter in head}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
    return [*(group for group in groups if group["params"]), {"params": head, "lr": recipe.head_lr}]


def train(
    model: nn.Module,
    method: Method,
    setup: Setup,
    recipe: Recipe,
    batches: Iterable[dict[str, Tensor]],
    validate: Evaluate,
    clock: Clock,
) -> Trained:
    """Train a model that `method.start` has readied, and leave it at its best.

    The best is the highest validation score, among equals the smallest validation loss: of small validation sets many
    models have the same score. A loss that is not finite ends the run.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(method, model, setup, recipe), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = get_scheduler(recipe.schedule or "linear", optimizer, round(recipe.warmup * recipe.steps), recipe.steps)
    found, best, worse = Trained(), Best(), 0
    losses: list[Tensor] = []
    source = endless(batches)
    model.train()
    for step in range(1, recipe.steps + 1):
        loss = model(**next(source)).loss
        losses.append(loss.detach())
        penalty = method.penalty(model, step - 1)
        (loss if penalty is None else loss + penalty).backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(model, step - 1)
        found.steps = step
        if step % recipe.eval_every and step < recipe.steps:
            continue
        found.losses += torch.stack(losses).tolist()
        if not np.isfinite(found.losses[-len(losses) :]).all():
            found.stopped = "diverged"
            break
        losses.clear()
        with clock.part("validation"):
            scores, value = validate(model)
        model.train()
        score = next(iter(scores.values()))
        found.history.append((step, score, value))
        if method.settled(model, step):
            if best.offer(model, score, value):
                found.best, found.best_loss, found.best_step, worse = scores, value, step, 0
            else:
                worse += 1
        if worse >= recipe.patience:
            found.stopped = "patience"
            break
    best.restore(model)
    return found
