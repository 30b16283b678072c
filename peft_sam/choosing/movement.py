"""How far each entry moves in a short dense training, which is then undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peft_sam.choosing.dense import restoring, train_densely
from peft_sam.choosing.gradients import GradientStatistics
from peft_sam.choosing.processes import Processes
from peft_sam.choosing.shards import is_sharded
from peft_sam.choosing.sums import Loss

# Adam's steps are as long whatever the gradient, so that the order of the movements hardly depends on the rate.
LR, CLIP, WARMUP = 1e-4, 1.0, 0.1


def rehearse(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    besides: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[Any], Loss],
    *,
    steps: int,
    processes: Processes | None = None,
    progress: bool = True,
) -> GradientStatistics:
    """The movement θ¹ − θ⁰ of `parameters` in a full fine-tuning of so many steps; then all are at θ⁰ again.

    AdamW at 1e-4, which grows over the first tenth of the steps and then falls linearly to zero; gradients are clipped
    to norm 1. Besides the model this needs five float32 numbers per entry. The movement is that of the float32 weights,
    also where the parameters are in half precision and their rounded values do not move.

    Args:
        parameters: name → candidate, whole and in memory.
        besides: what else is trained, and put back, too: the head.
        the others: as in `dense.train_densely`.

    Raises:
        ValueError: if a candidate is sharded or no leaf in floating point (quantised, offloaded).
    """
    start = time.perf_counter()
    for name, parameter in parameters.items():
        whole = isinstance(parameter, nn.Parameter) and not is_sharded(parameter) and not parameter.is_meta
        if not whole or not parameter.is_floating_point():
            raise ValueError(
                f"score 'movement' trains all candidates densely, and {name!r} is sharded, quantised or offloaded: use "
                "another score, or select on the whole model in memory and pass the result: "
                "select_parameters(model, selection=...)."
            )
    everything: dict[str, Any] = {**parameters, **{f"besides: {name}": p for name, p in besides.items()}}
    with restoring(everything.values(), only_on_error=False) as before:
        trained = train_densely(
            model,
            everything,
            batches,
            loss,
            what="Rehearsal",
            steps=steps,
            lr=LR,
            warmup=int(WARMUP * steps),
            clip=CLIP,
            processes=processes,
            progress=progress,
        )
        moved = {name: trained.weights[name].sub_(old) for name, old in zip(parameters, before, strict=False)}
    return GradientStatistics({"movement": moved}, trained.samples, steps, time.perf_counter() - start)
