"""The accumulators of the pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from peft_sam.curvature import hessian_products
from peft_sam.linear_calls import LinearCall

# A half-precision backward pass runs on a loss this many times larger, so that small gradients do not vanish; a
# power of two, so that dividing by it again is exact.
HALF_PRECISION_LOSS_SCALE = 2.0**10


@dataclass(frozen=True)
class Loss:
    """The mean loss of one batch, and over how many examples (target tokens) it is the mean."""

    value: Tensor
    samples: float


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
    """The accumulators: Σ n_b g_b and its like, taken up as soon as a parameter's gradient exists."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        kinds: tuple[str, ...],
        probes: int,
        seed: int,
        hidden: Mapping[str, LinearCall],
        pieces: Mapping[str, tuple[int, int]],
    ) -> None:
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device: load the weights before selecting.")
        if hidden and "hessian" in kinds:
            raise ValueError(
                f"parameter {next(iter(hidden))!r} is quantised or offloaded and has no second derivative: use "
                'curvature="fisher".'
            )
        self.parameters, self.probes, self.seed, self.hidden, self.pieces = parameters, probes, seed, hidden, pieces
        self.leaves = {name: parameter for name, parameter in parameters.items() if name not in hidden}
        self.of_calls: dict[str, Tensor] = {}
        self.tensors = {kind: {name: self._accumulator(name) for name in parameters} for kind in kinds}
        self.weight, self.unscale = 0.0, 1.0
        self.seen: list[tuple[str, Tensor]] = []

    @property
    def device(self) -> torch.device:
        """Where the first accumulator is: collectives need their tensors there."""
        return next(tensor.device for tensors in self.tensors.values() for tensor in tensors.values())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks that take each parameter's gradient and free it."""

        def hook(name: str) -> Callable[[Tensor], None]:
            return lambda parameter: self._take(name, parameter)

        handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in self.leaves.items()]
        handles += [call.listen(name, self._take_from_call) for name, call in self.hidden.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, loss: Loss, number: int) -> None:
        """Run batch `number` backward."""
        scale = _loss_scale(loss.value, self.parameters.values())
        self.weight, self.unscale = loss.samples, 1.0 / scale
        self.seen.clear()
        self.of_calls.clear()
        if "hessian" in self.tensors:
            self._add_hessian(loss.value * scale)
        else:
            (loss.value * scale).backward()
        for name in list(self.of_calls):
            self._add(name, self.of_calls.pop(name))
        self._check(number)

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
        gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
        for name, gradient in gradients.items():
            self._add(name, gradient.detach())
        for name, product in hessian_products(gradients, self.parameters, self.probes, self.seed):
            self.seen.append((name, product.sum(dtype=torch.float32)))
            self.tensors["hessian"][name].add_(
                self._piece(name, product), alpha=self.weight * self.unscale / self.probes
            )

    def _take(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        self._add(name, gradient.to_dense() if gradient.is_sparse else gradient)

    def _add(self, name: str, gradient: Tensor) -> None:
        self.seen.append((name, gradient.sum(dtype=torch.float32)))
        gradient = self._piece(name, gradient)
        for kind, add in ACCUMULATE.items():
            if kind in self.tensors:
                add(self.tensors[kind][name], gradient, self.weight, self.unscale)

    def _accumulator(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        start, stop = self.pieces.get(name, (0, 0))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros((stop - start,) if stop else parameter.shape, dtype=dtype, device=parameter.device)

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
            if not good and not all(bool(of[name].isfinite().all()) for of in self.tensors.values()):
                raise FloatingPointError(
                    f"the gradient of {name!r} in batch {number} has NaN or infinite entries; nothing was selected."
                )

    def means(self, samples: float, reduce: Callable[[Tensor], Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """The sums over all processes, divided by the samples."""
        for tensors in self.tensors.values():
            for name, tensor in tensors.items():
                tensors[name] = (tensor if reduce is None else reduce(tensor)).div_(samples)
        if not self.pieces and not any(bool(t.any()) for tensors in self.tensors.values() for t in tensors.values()):
            raise_no_gradient(len(self.parameters))
        return self.tensors


def _loss_scale(loss: Tensor, parameters: Iterable[Tensor]) -> float:
    autocast = torch.is_autocast_enabled(loss.device.type) and torch.get_autocast_dtype(loss.device.type)
    half = autocast == torch.float16 or any(p.dtype == torch.float16 for p in parameters)
    return HALF_PRECISION_LOSS_SCALE if half else 1.0


def raise_no_gradient(parameters: int) -> NoReturn:
    """Say that the loss reaches none of so many candidate parameters."""
    raise ValueError(
        f"all gradients of the {parameters} candidate parameters are zero: the loss does not reach them. Check that it "
        "depends on the targeted modules' outputs (and that the head is not all zeros)."
    )
