"""Training some of a model's parameters densely before the adapter is trained: a head's warm-up, a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from peft_sam.choosing.before import as_before, remember_random_states
from peft_sam.choosing.processes import Processes
from peft_sam.choosing.shards import is_sharded, local, sharing
from peft_sam.choosing.sums import STEP_BACK, Loss, backward, check_loss, loss_scale

Batch = TypeVar("Batch")
UNCHANGED = "the parameters are as before."


@dataclass(frozen=True)
class Trained:
    """What came of training densely.

    Attributes:
        weights: name → the parameter's trained values in float32, before they were rounded to its type.
        samples: over how many the steps' losses were means, all together.
    """

    weights: dict[str, Tensor]
    samples: float


def train_densely(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[Any], Loss],
    *,
    what: str,
    steps: int,
    lr: float,
    warmup: int = 0,
    clip: float = float("inf"),
    processes: Processes | None = None,
    progress: bool = True,
) -> Trained:
    """Train `parameters` alone for some steps, in train mode, by AdamW without weight decay.

    A step takes one batch of each process; its gradient is that of the mean loss over all their samples. The batches
    are read again and again, each time as they come. Weights and moments are kept in float32, also of parameters in
    half precision. Only the parameters change: flags, modes, `.grad`s, buffers and random states are as before, also
    after an error.

    Args:
        model: the module whose mode is set.
        parameters: name → parameter of the model.
        loss: batch → `Loss`; must run the model.
        what: this is, for errors and the progress bar.
        lr, warmup: the rate grows linearly to `lr` over the first `warmup` steps and then falls linearly to zero.
        clip: the largest norm of a step's gradient.
        processes: those that share the batches.

    Raises:
        ValueError: if the batches can be read only once, or there are none, or a loss does not reach the parameters.
        FloatingPointError: if a loss is NaN or infinite.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{what} reads the data more than once, but these batches can be read only once "
            f"({type(batches).__name__}): pass a DataLoader or a list."
        )
    processes = processes or sharing(parameters)
    number, sharded = processes.number if processes else 1, any(map(is_sharded, parameters.values()))
    masters = [parameter.detach().clone().to(torch.float32) for parameter in parameters.values()]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    source, taken, seen, largest_scale = endless(batches), 0, 0.0, float("inf")
    every = processes.in_step(source) if processes else ((batch, True) for batch in source)
    with (
        as_before(model, parameters, True),
        tqdm(total=steps, desc=what, dynamic_ncols=True, disable=not progress) as bar,
    ):
        for step, (batch, counts) in zip(range(steps), every, strict=False):
            total, put_back = 0.0, remember_random_states()
            while True:
                if processes:
                    processes.at(f"step {step} of {what}")
                with torch.enable_grad(), processes.together() if processes else nullcontext():
                    current = _checked(loss(batch), what, step)
                samples = current.samples if counts else 0.0
                total = float(processes.sum(torch.tensor(samples, dtype=torch.float64))) if processes else samples
                scale = min(loss_scale(current, parameters.values()), largest_scale)
                if samples or sharded:  # a process without samples still takes part in FSDP's backward pass
                    backward(current.value, samples * number / (total or 1.0) * scale, parameters.values())
                for parameter, master in zip(parameters.values(), masters, strict=True):
                    master.grad = _averaged(parameter, processes).div_(scale)
                    parameter.grad = None
                if _finite(masters, processes if sharded else None):
                    break
                if scale <= 1:
                    raise FloatingPointError(f"a gradient of step {step} of {what} is NaN or infinite; {UNCHANGED}")
                largest_scale = scale / STEP_BACK
                put_back()
            if clip < float("inf"):
                nn.utils.clip_grad_norm_(masters, clip)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for parameter, master in zip(parameters.values(), masters, strict=True):
                    parameter.copy_(master)
            taken, seen = taken + 1, seen + total
            bar.update()
        if taken < steps:
            raise ValueError(f"there are no batches for {what}: give a loader that yields some.")
    return Trained(dict(zip(parameters, masters, strict=True)), seen)


def _checked(loss: Loss, what: str, step: int) -> Loss:
    check_loss(loss.value, step, "trained parameters")
    if loss.samples and not bool(torch.isfinite(loss.value)):
        raise FloatingPointError(f"the loss of step {step} of {what} is {loss.value.item()}; {UNCHANGED}")
    return loss


def _finite(masters: Iterable[Tensor], sharing: Processes | None) -> bool:
    """Whether all gradients are finite, of all processes that have parts of them."""
    parts = [local(master.grad) for master in masters if master.grad is not None]
    bad = torch.tensor(float(not all(bool(part.isfinite().all()) for part in parts)))
    return not float(sharing.sum(bad) if sharing else bad)


def _averaged(parameter: nn.Parameter, processes: Processes | None) -> Tensor:
    """The mean of the processes' gradients, in float32; FSDP has taken it already."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.to(torch.float32)
    if processes is None or is_sharded(gradient):
        return gradient
    return processes.sum(gradient).div_(processes.number)


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, again and again; none if there are none."""
    found = True
    while found:
        found = False
        for batch in batches:
            found = True
            yield batch


@torch.no_grad()
def copy_whole(source: Mapping[str, nn.Parameter], to: Mapping[str, nn.Parameter]) -> None:
    """Copy parameters of a sharded twin to those of the same name in the model; nothing if they are the same."""
    for name, parameter in to.items():
        if source[name] is not parameter:
            value = source[name]
            parameter.copy_(value.full_tensor() if isinstance(value, DTensor) else value)


@contextmanager
def restoring(parameters: Iterable[nn.Parameter], only_on_error: bool) -> Iterator[list[Tensor]]:
    """Give parameters the values back that they had, in the end or if anything goes wrong; yields these values."""
    every = list(parameters)
    before = [parameter.detach().clone() for parameter in every]
    done = False
    try:
        yield before
        done = only_on_error
    finally:
        if not done:
            with torch.no_grad():
                for parameter, value in zip(every, before, strict=True):
                    parameter.copy_(value)
