"""What the gradients of the mean loss did, accumulated over data, for any `nn.Module`, loader and loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from peft_sam.choosing.before import as_before, remember_random_states
from peft_sam.choosing.linear_calls import LinearCall
from peft_sam.choosing.processes import Processes
from peft_sam.choosing.sums import Loss, Sums


@dataclass
class GradientStatistics:
    """Means over samples, per parameter.

    Attributes:
        tensors: statistic ("gradient", "squared_gradient", "hessian") → parameter name → float32 tensor of its shape
            (float64 for float64 parameters).
        samples, batches, seconds: extent of the pass.
    """

    tensors: dict[str, dict[str, Tensor]]
    samples: float
    batches: int
    seconds: float


def accumulate(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Callable[[Any], Loss],
    *,
    statistics: Iterable[str] = ("gradient",),
    train_mode: bool = False,
    probes: int = 1,
    seed: int = 0,
    hidden: Mapping[str, LinearCall] | None = None,
    pieces: Mapping[str, tuple[int, int]] | None = None,
    in_host_memory: bool = False,
    processes: Processes | None = None,
    total: int | None = None,
    progress: bool = True,
) -> GradientStatistics:
    """Run `loss` forward and backward over `batches` and accumulate statistics of the gradients of `parameters`.

    With n_b the samples of batch b and g_b the gradient of its mean loss, N = Σ n_b:

    * gradient = Σ n_b g_b / N, the gradient of the mean loss over all samples;
    * squared_gradient = Σ n_b g_b² / N, a mean over micro-batches;
    * hessian = Σ n_b mean_v(v ⊙ H_b v) / N, Hutchinson's estimate of the diagonal of the mean loss's Hessian, with the
      same random signs v for all batches. Needs a loss that can be differentiated twice.

    One parameter's dense gradient exists at a time on top of the accumulators. Afterwards, also after an error, all
    requires_grad flags, train/eval modes, `.grad`s, buffers, hooks and random states are as before.

    Args:
        model: the module whose mode is set; eval unless `train_mode`.
        parameters: name → leaf parameter of the model.
        loss: batch → `Loss`; must run the model.
        probes, seed: how many random signs v for "hessian", and their seed.
        hidden: name → the linear layer that owns the parameter, for parameters that cannot have a gradient of their
            own (quantised, offloaded): theirs is computed from the layer's inputs and its outputs' gradients.
        pieces: name → flat positions (start, stop), to accumulate only these entries, in flat tensors.
        in_host_memory: keep the accumulators there instead of next to the parameters.
        processes: those that share the pass, each with batches of its own. Their sums are added up once, after the
            last batch; those of sharded parameters (FSDP2) batch by batch, each process keeping its shard.
        total: number of batches, for the progress bar.

    Raises:
        ValueError: if a statistic is not known, there is no batch, a parameter has no storage (meta device), or no
            gradient reaches any.
        FloatingPointError: if a loss or gradient is NaN or infinite; names the batch and the parameter.
        RuntimeError: if another process had such an error; names the process and says the error.
    """
    start = time.perf_counter()
    kinds = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    sums = Sums(parameters, kinds, probes, seed, hidden or {}, pieces or {}, in_host_memory)
    if sums.sharing and processes is None:
        processes = Processes(sums.sharing.device)
    samples, number = 0.0, 0
    with ExitStack() as stack:
        quantised = [call.module for call in sums.hidden.values()]
        stack.enter_context(as_before(model, sums.leaves, train_mode, read_only=quantised))
        stack.enter_context(sums.listening(model))
        bar = stack.enter_context(
            tqdm(total=total, desc="Gradient statistics", dynamic_ncols=True, disable=not progress)
        )
        if "hessian" in sums.tensors:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
        in_step = processes if sums.sharing else None
        steps = in_step.in_step(batches) if in_step else ((batch, True) for batch in batches)
        with processes.together(steps) if processes and not in_step else nullcontext():
            for batch, counts in steps:
                if processes:
                    processes.at(f"batch {number}")
                with torch.enable_grad():
                    once_more = remember_random_states()
                    current = loss(batch)
                    current = current if counts else replace(current, samples=0.0)
                    if in_step:
                        with in_step.together():
                            sums.add(current, number)
                    elif current.samples:  # the mean over nothing is no number
                        while not sums.add(current, number):
                            once_more()
                            current = loss(batch)
                samples += current.samples
                number += counts
                bar.update(counts)
    if processes is not None:
        count = processes.sum(torch.tensor([samples, float(number)], dtype=torch.float64))
        samples, number = float(count[0]), int(count[1])
    if samples == 0:
        raise ValueError(
            f"the pass saw {number} batches with no samples in them, so there is no gradient to select by: give a "
            "loader that yields labelled batches."
        )
    return GradientStatistics(sums.means(samples, processes), samples, number, time.perf_counter() - start)
