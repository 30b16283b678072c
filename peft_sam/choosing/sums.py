"""The accumulators of the pass over the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_sam.choosing.before import others_as_before, passes_by
from peft_sam.choosing.curvature import hessian_products
from peft_sam.choosing.linear_calls import LinearCall
from peft_sam.choosing.processes import Processes
from peft_sam.choosing.shards import WholeParameters, is_sharded, local, sharing, sum_to_shard

# A backward pass in float16 runs on a loss this many times larger, so that small gradients do not vanish, and on a
# smaller one where large ones overflow. Powers of two, so that dividing by them again is exact.
HALF_PRECISION_LOSS_SCALE = 2.0**10
STEP_BACK = 2.0**5
# before the name of a parameter, its term of the Hessian
HESSIAN = "hessian of "


@dataclass(frozen=True)
class Loss:
    """The mean loss of one batch, and over how many examples (target tokens) it is the mean.

    Attributes:
        half_precision: whether it was computed in float16 by autocast.

    Raises:
        ValueError: if the number is none, or negative.
    """

    value: Tensor
    samples: float
    half_precision: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.samples < inf:
            raise ValueError(
                f"a batch counts as {self.samples} samples; expected a finite number that is at least 0. If count_fn "
                "gave it, mend that: it says over how many samples the batch's loss is a mean."
            )


def _add_gradient(into: Tensor, gradient: Tensor, weight: float, unscale: float) -> None:
    into.add_(gradient, alpha=weight * unscale)


def _add_squared_gradient(into: Tensor, gradient: Tensor, weight: float, unscale: float) -> None:
    gradient = gradient.to(into.dtype)
    into.addcmul_(gradient, gradient, value=weight * unscale * unscale)


ACCUMULATE: dict[str, Callable[[Tensor, Tensor, float, float], None]] = {
    "gradient": _add_gradient,
    "squared_gradient": _add_squared_gradient,
}


class Sums:
    """The accumulators: Σ n_b g_b and its like, taken up as soon as a parameter's gradient exists.

    Of a sharded parameter a process has the accumulator of its own rows; each batch's term is summed over the
    processes as it comes, since no process could keep a whole one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        kinds: tuple[str, ...],
        probes: int,
        seed: int,
        hidden: Mapping[str, LinearCall],
        pieces: Mapping[str, tuple[int, int]],
        in_host_memory: bool,
    ) -> None:
        if unknown := sorted(set(kinds) - {*ACCUMULATE, "hessian"}):
            raise ValueError(f"statistics are any of {[*ACCUMULATE, 'hessian']}; got {unknown}.")
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device: load the weights before selecting.")
        self.sharing = sharing(parameters)
        if self.sharing and "hessian" in kinds:
            raise ValueError(
                'the parameters are sharded, and second derivatives do not pass through FSDP: use curvature="fisher".'
            )
        if self.sharing and pieces:
            raise ValueError("memory_budget is for whole models: a sharded one needs more processes instead.")
        if hidden and "hessian" in kinds:
            raise ValueError(
                f"parameter {next(iter(hidden))!r} is quantised or offloaded and has no second derivative: use "
                'curvature="fisher".'
            )
        self.parameters, self.probes, self.seed, self.hidden, self.pieces = parameters, probes, seed, hidden, pieces
        self.leaves = {name: parameter for name, parameter in parameters.items() if name not in hidden}
        self.in_host_memory = in_host_memory
        self.of_calls: dict[str, Tensor] = {}
        self.tensors = {kind: {name: self._accumulator(name) for name in parameters} for kind in kinds}
        self.weight, self.scale, self.largest_scale = 0.0, 1.0, HALF_PRECISION_LOSS_SCALE
        self.seen: list[tuple[str, Tensor]] = []
        # of one batch: how many terms of a name there were; whether each is finite; which were not, at a larger scale
        self.arrived: Counter[str] = Counter()
        self.finite: list[tuple[tuple[str, int], Tensor]] = []
        self.lacking: set[tuple[str, int]] | None = None

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hooks that take each parameter's gradient and free it."""
        handles = WholeParameters(model, self.leaves).listen(self._take)
        for name, parameter in self.leaves.items():
            if not is_sharded(parameter):
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._take, name)))
        for name, call in self.hidden.items():
            handles.append(call.listen(name, self._take_from_call))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, loss: Loss, number: int) -> bool:
        """Run batch `number` backward.

        Returns:
            Whether all of it was added. If not, float16 overflowed: the batch is to come once more, for what lacks.

        Raises:
            ValueError: if the loss is not one number, or has no gradient.
            FloatingPointError: if it or a gradient is NaN or infinite.
        """
        check_loss(loss.value, number)
        self.scale = 1.0 if self.sharing else min(loss_scale(loss, self.parameters.values()), self.largest_scale)
        self.weight = loss.samples
        for of_the_batch in (self.seen, self.finite, self.of_calls, self.arrived):
            of_the_batch.clear()
        if "hessian" in self.tensors:
            self._add_hessian(loss.value * self.scale)
        else:
            backward(loss.value, self.scale, self.leaves.values())
        for name in list(self.of_calls):
            self._add(name, self.of_calls.pop(name))
        if loss.samples and not bool(torch.isfinite(loss.value)):
            raise FloatingPointError(f"the loss of batch {number} is {loss.value.item()}; nothing was selected.")
        self._check(number)
        self.lacking = {key for key, good in self.finite if not bool(good)} or None
        if self.lacking:
            self.largest_scale = self.scale / STEP_BACK
        return self.lacking is None

    def _take_from_call(self, name: str, gradient: Tensor) -> None:
        """A layer may run several times in a batch: the calls' gradients add up before they are squared."""
        if set(self.tensors) == {"gradient"}:
            self._add(name, gradient)
        elif name in self.of_calls:
            self.of_calls[name] += gradient
        else:
            self.of_calls[name] = gradient

    def _add_hessian(self, loss: Tensor) -> None:
        names, parameters = list(self.parameters), list(self.parameters.values())
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        if any(gradient is None for gradient in found) and passes_by(loss, "CheckpointFunctionBackward"):
            raise ValueError(
                "the loss was computed under reentrant checkpoints, which no second derivative passes: checkpoint with "
                'use_reentrant=False, or use curvature="fisher".'
            )
        gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
        for name, gradient in gradients.items():
            self._add(name, gradient.detach())
        for name, product in hessian_products(gradients, self.parameters, self.probes, self.seed):
            term = self._new(HESSIAN + name, product)
            if term is not None:
                into = self.tensors["hessian"][name]
                into.add_(self._piece(name, term).to(into.device), alpha=self.weight / self.scale / self.probes)

    def _take(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        self._add(name, gradient.to_dense() if gradient.is_sparse else gradient)

    def _new(self, name: str, term: Tensor) -> Tensor | None:
        """A term as it is to be added: nothing of it if it overflowed, None if it was added at a larger scale."""
        key = (name, self.arrived[name])
        self.arrived[name] += 1
        if self.lacking is not None and key not in self.lacking:
            return None
        if self.scale > 1:
            self.finite.append((key, term.isfinite().all()))
            return torch.where(self.finite[-1][1], term, 0.0)
        if self.weight:
            self.seen.append((name, term.sum(dtype=torch.float32)))
        return term

    def _add(self, name: str, gradient: Tensor) -> None:
        new = self._new(name, gradient)
        if new is None:
            return
        parameter, gradient = self.parameters[name], self._piece(name, new)
        for kind, add in ACCUMULATE.items():
            if kind in self.tensors:
                into = self.tensors[kind][name]
                if isinstance(parameter, DTensor):
                    term = torch.zeros_like(gradient, dtype=into.dtype)
                    if self.weight:  # a mean over nothing may be no number
                        add(term, gradient, self.weight, 1.0 / self.scale)
                    into.add_(sum_to_shard(term, parameter).to(into.device))
                else:
                    add(into, gradient.to(into.device), self.weight, 1.0 / self.scale)

    def _accumulator(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        start, stop = self.pieces.get(name, (0, 0))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        shape = (stop - start,) if stop else local(parameter).shape
        return torch.zeros(shape, dtype=dtype, device="cpu" if self.in_host_memory else parameter.device)

    def _piece(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.pieces:
            return tensor
        start, stop = self.pieces[name]
        return tensor.flatten()[start:stop]

    def _check(self, number: int) -> None:
        """One look at the device per batch: a NaN or infinite entry makes its tensor's sum so."""
        if not self.seen:
            return
        device = self.seen[0][1].device
        finite = torch.stack([total.to(device) for _, total in self.seen]).isfinite().tolist()
        for (name, _), good in zip(self.seen, finite, strict=True):
            # a sum of large finite entries may overflow too
            of_whom = name.removeprefix(HESSIAN)
            if not good and not all(bool(of[of_whom].isfinite().all()) for of in self.tensors.values()):
                raise FloatingPointError(
                    f"the gradient of {of_whom!r} in batch {number} has NaN or infinite entries; nothing was selected."
                )

    def means(self, samples: float, processes: Processes | None) -> dict[str, dict[str, Tensor]]:
        """The sums over all processes, divided by the samples."""
        found = torch.zeros(1)
        for tensors in self.tensors.values():
            for name, tensor in tensors.items():
                whole = processes is None or is_sharded(self.parameters[name])
                tensors[name] = (tensor if whole else processes.sum(tensor)).div_(samples)  # type: ignore[union-attr]
                found += float(tensors[name].any())
        if self.sharing:
            found = self.sharing.sum(found)
        if not self.pieces and not float(found):
            raise_no_gradient(len(self.parameters))
        return self.tensors


def check_loss(loss: Tensor, number: int, depends_on: str = "candidate parameters") -> None:
    """Whether a loss can be differentiated.

    Raises:
        ValueError: if it is not one number, or does not depend on what it should.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss of batch {number} has shape {tuple(loss.shape)}; expected one number, a mean.")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} does not depend on the {depends_on}: it has no gradient. Check that "
            "the loss is computed from the model's outputs and not detached, and that these parameters have a part in "
            "them."
        )


def loss_scale(loss: Loss, parameters: Iterable[Tensor]) -> float:
    """What a loss is multiplied by for its backward pass, at most."""
    half = loss.half_precision or any(parameter.dtype == torch.float16 for parameter in parameters)
    return HALF_PRECISION_LOSS_SCALE if half else 1.0


def backward(loss: Tensor, factor: float, wanted: Iterable[Tensor]) -> None:
    """Run a loss times a factor backward, for the gradients of the leaves `wanted` alone."""
    with others_as_before(loss, set(map(id, wanted))):
        loss.backward(torch.full_like(loss, factor))  # times the loss it may be too large for float16


def raise_no_gradient(parameters: int) -> NoReturn:
    """Say that the loss reaches none of so many candidate parameters."""
    raise ValueError(
        f"all gradients of the {parameters} candidate parameters are zero: the loss does not reach them. Check that it "
        "depends on the targeted modules' outputs (and that the head is not all zeros)."
    )
