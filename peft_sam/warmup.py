"""Training the head before the pass, so that scores do not come from the noise of a head that was just initialised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from peft_sam.gradients import as_before
from peft_sam.processes import Processes
from peft_sam.shards import is_sharded, sharing
from peft_sam.sums import Loss, check_loss, loss_scale


def warm_head(
    model: nn.Module,
    head: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[Any], Loss],
    *,
    steps: int,
    lr: float,
    processes: Processes | None = None,
    progress: bool = True,
) -> None:
    """Train `head` alone for some steps, in train mode: AdamW without weight decay, `lr` falling linearly to zero.

    A step takes one batch of each process; its gradient is that of the mean loss over all their samples. The batches
    are read again and again, each time as they come. Sums are kept in float32, also for a head in half precision.
    Only the head changes: flags, modes, `.grad`s and random states are as before, also after an error.

    Args:
        model: the module whose mode is set.
        head: name → parameter of the model.
        loss: batch → `Loss`; must run the model.
        processes: those that share the batches.

    Raises:
        ValueError: if the batches can be read only once, or there are none, or a loss does not reach the head.
        FloatingPointError: if a loss is NaN or infinite.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"head_warmup_steps reads the data before the pass does, but these batches can be read only once "
            f"({type(batches).__name__}): pass a DataLoader or a list."
        )
    processes = processes or sharing(head)
    number, sharded = processes.number if processes else 1, any(is_sharded(parameter) for parameter in head.values())
    masters = [parameter.detach().clone().to(torch.float32) for parameter in head.values()]
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    source, taken = _endless(batches), 0
    every = processes.in_step(source) if processes else ((batch, True) for batch in source)
    with as_before(model, head, True), tqdm(total=steps, desc="Head warm-up", disable=not progress) as bar:
        for step, (batch, counts) in zip(range(steps), every, strict=False):
            with torch.enable_grad(), processes.together() if processes else nullcontext():
                current = _checked(loss(batch), step)
            samples = current.samples if counts else 0.0
            total = float(processes.sum(torch.tensor(samples, dtype=torch.float64))) if processes else samples
            scale = loss_scale(current.value, head.values())
            if samples or sharded:  # a process without samples still takes part in FSDP's backward pass
                (current.value * (samples * number / (total or 1.0) * scale)).backward()
            for parameter, master in zip(head.values(), masters, strict=True):
                master.grad = _averaged(parameter, processes).div_(scale)
                parameter.grad = None
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for parameter, master in zip(head.values(), masters, strict=True):
                    parameter.copy_(master)
            taken += 1
            bar.update()
        if taken < steps:
            raise ValueError("there are no batches to train the head on: give a loader that yields some.")


def _checked(loss: Loss, step: int) -> Loss:
    check_loss(loss.value, step, "head")
    if loss.samples and not bool(torch.isfinite(loss.value)):
        raise FloatingPointError(
            f"the loss of step {step} of the head's warm-up is {loss.value.item()}; the head is as before."
        )
    return loss


def _averaged(parameter: nn.Parameter, processes: Processes | None) -> Tensor:
    """The mean of the processes' gradients, in float32; FSDP has taken it already."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.to(torch.float32)
    if processes is None or is_sharded(gradient):
        return gradient
    return processes.sum(gradient).div_(processes.number)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
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
def put_back_on_error(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Give parameters the values back that they had, if anything goes wrong."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
