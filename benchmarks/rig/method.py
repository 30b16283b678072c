"""What a way to fine-tune is: which parameters are trained, and what happens to them around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_sam import Loss


@dataclass(frozen=True)
class Setup:
    """What a method may know of the run that it is part of.

    Attributes:
        density: p, the share of the candidates' entries that is trained, for the methods that have one.
        seed: of everything random in the method.
        steps, lr: optimizer steps of the run, and its peak learning rate.
        batches: the training batches, dicts of tensors with labels; may be read again and again.
        head: names of the modules of the model that are the task's head: trained densely by every method.
        candidates: names of the modules of the model whose parameters are candidates.
    """

    density: float
    seed: int
    steps: int
    lr: float
    batches: Iterable[dict[str, Any]]
    head: tuple[str, ...]
    candidates: tuple[str, ...]


class Method:
    """A way to fine-tune; the hooks are called by the one training loop (`benchmarks.rig.loop`).

    The loop computes `model(**batch).loss`, adds `penalty`, runs backward, clips gradients, steps the optimizer over
    `groups`, and calls `after_step`. Steps count from 0.
    """

    name: ClassVar[str]

    def start(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Ready the model: freeze, wrap, select. Returns the model to train (the same object or a wrapped one)."""
        raise NotImplementedError

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer; by default all that require gradients, at `lr`."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        """What is added to the loss of a step, if anything."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """After the optimizer's step: parameters may be changed."""

    def settled(self, model: nn.Module, step: int) -> bool:
        """Whether the model after so many steps is what the method would hand over; only then may it be the best."""
        return True

    def trained(self, model: nn.Module, setup: Setup) -> int:
        """How many entries outside the head are trained."""
        return sum(p.numel() for _, p in named_rest(model, setup) if p.requires_grad)

    def stored_bytes(self, model: nn.Module, setup: Setup) -> int:
        """Size of what must be stored for the task besides the head and the pretrained model, in bytes."""
        return sum(p.numel() * p.element_size() for _, p in named_rest(model, setup) if p.requires_grad)


def mean_loss(model: nn.Module) -> Callable[[dict[str, Any]], Loss]:
    """A model's own loss of a batch, as the passes of `peft_sam` take it."""
    return lambda batch: Loss(model(**batch).loss, len(batch["labels"]))


def named_head(model: nn.Module, setup: Setup) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the head, by name; of a model as it was built or wrapped by PEFT."""
    for name, parameter in model.named_parameters():
        if any(name.removeprefix("base_model.model.").startswith(f"{module}.") for module in setup.head):
            yield name, parameter


def named_rest(model: nn.Module, setup: Setup) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters outside the head, by name."""
    head = {id(parameter) for _, parameter in named_head(model, setup)}
    return ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in head)
