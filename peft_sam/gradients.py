"""What the gradients of the mean loss did, accumulated over data, for any `nn.Module`, loader and loss."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from peft_sam.curvature import hessian_products

# A half-precision backward pass runs on a loss this many times larger, so that small gradients do not vanish; a
# power of two, so that dividing by it again is exact.
HALF_PRECISION_LOSS_SCALE = 2.0**10


@dataclass(frozen=True)
class Loss:
    """The mean loss of one batch, and over how many examples (target tokens) it is the mean."""

    value: Tensor
    samples: float


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


def _add_gradient(into: Tensor, gradient: Tensor, weight: float, unscale: float) -> None:
    into.add_(gradient, alpha=weight * unscale)


def _add_squared_gradient(into: Tensor, gradient: Tensor, weight: float, unscale: float) -> None:
    gradient = gradient.to(into.dtype)
    into.addcmul_(gradient, gradient, value=weight * unscale * unscale)


ACCUMULATE: dict[str, Callable[[Tensor, Tensor, float, float], None]] = {
    "gradient": _add_gradient,
    "squared_gradient": _add_squared_gradient,
}


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
    reduce: Callable[[Tensor], Tensor] | None = None,
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
    requires_grad flags, train/eval modes, `.grad`s, hooks and random states are as before.

    Args:
        model: the module whose mode is set; eval unless `train_mode`.
        parameters: name → leaf parameter of the model.
        loss: batch → `Loss`; must run the model.
        probes, seed: how many random signs v for "hessian", and their seed.
        reduce: sums a tensor over processes; called once per accumulator, after the last batch.
        total: number of batches, for the progress bar.

    Raises:
        ValueError: if there is no batch, a parameter has no storage (meta device), or no gradient reaches any.
        FloatingPointError: if a loss or gradient is NaN or infinite; names the batch and the parameter.
    """
    start = time.perf_counter()
    sums = _Sums(parameters, tuple(statistics), probes, seed)
    samples, number = 0.0, 0
    with ExitStack() as stack:
        stack.enter_context(_as_before(model, parameters, train_mode))
        stack.enter_context(sums.listening())
        bar = stack.enter_context(
            tqdm(total=total, desc="Gradient statistics", dynamic_ncols=True, disable=not progress)
        )
        if "hessian" in sums.tensors:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
        for batch in batches:
            with torch.enable_grad():
                current = loss(batch)
                if current.samples:  # the mean over nothing is no number
                    _check_loss(current.value, number)
                    sums.add(current, number)
            samples += current.samples
            number += 1
            bar.update()
    if reduce is not None:
        count = reduce(torch.tensor([samples, float(number)], dtype=torch.float64, device=sums.device))
        samples, number = float(count[0]), int(count[1])
    if samples == 0:
        raise ValueError(
            f"the pass saw {number} batches with no samples in them, so there is no gradient to select by: give a "
            "loader that yields labelled batches."
        )
    return GradientStatistics(sums.means(samples, reduce), samples, number, time.perf_counter() - start)


class _Sums:
    """The accumulators: Σ n_b g_b and its like, taken up as soon as a parameter's gradient exists."""

    def __init__(self, parameters: Mapping[str, Tensor], kinds: tuple[str, ...], probes: int, seed: int) -> None:
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device: load the weights before selecting.")
        self.parameters, self.probes, self.seed = parameters, probes, seed
        self.tensors = {kind: {name: _accumulator(p) for name, p in parameters.items()} for kind in kinds}
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

        handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in self.parameters.items()]
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
        if "hessian" in self.tensors:
            self._add_hessian(loss.value * scale)
        else:
            (loss.value * scale).backward()
        self._check(number)

    def _add_hessian(self, loss: Tensor) -> None:
        names, parameters = list(self.parameters), list(self.parameters.values())
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
        for name, gradient in gradients.items():
            self._add(name, gradient.detach())
        for name, product in hessian_products(gradients, self.parameters, self.probes, self.seed):
            self.seen.append((name, product.sum(dtype=torch.float32)))
            self.tensors["hessian"][name].add_(product, alpha=self.weight * self.unscale / self.probes)

    def _take(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        self._add(name, gradient.to_dense() if gradient.is_sparse else gradient)

    def _add(self, name: str, gradient: Tensor) -> None:
        self.seen.append((name, gradient.sum(dtype=torch.float32)))
        for kind, add in ACCUMULATE.items():
            if kind in self.tensors:
                add(self.tensors[kind][name], gradient, self.weight, self.unscale)

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
        if not any(bool(tensor.any()) for tensors in self.tensors.values() for tensor in tensors.values()):
            raise ValueError(
                f"all gradients of the {len(self.parameters)} candidate parameters are zero: the loss does not reach "
                "them. Check that it depends on the targeted modules' outputs (and that the head is not all zeros)."
            )
        return self.tensors


def _accumulator(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _loss_scale(loss: Tensor, parameters: Iterable[Tensor]) -> float:
    autocast = torch.is_autocast_enabled(loss.device.type) and torch.get_autocast_dtype(loss.device.type)
    half = autocast == torch.float16 or any(p.dtype == torch.float16 for p in parameters)
    return HALF_PRECISION_LOSS_SCALE if half else 1.0


def _check_loss(loss: Tensor, number: int) -> None:
    if loss.numel() != 1:
        raise ValueError(f"the loss of batch {number} has shape {tuple(loss.shape)}; expected one number, a mean.")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} does not depend on the candidate parameters: it has no gradient. Check that "
            "the loss is computed from the model's outputs and not detached."
        )
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"the loss of batch {number} is {loss.item()}; nothing was selected.")


@contextmanager
def _as_before(model: nn.Module, parameters: Mapping[str, Tensor], train_mode: bool) -> Iterator[None]:
    """Give only `parameters` gradients and set the mode; put everything back at the end."""
    wanted = {id(parameter) for parameter in parameters.values()}
    everything = {id(p): p for p in (*model.parameters(), *parameters.values())}.values()
    flags = [(parameter, parameter.requires_grad) for parameter in everything]
    grads = [(parameter, parameter.grad) for parameter in parameters.values()]
    modes = [(module, module.training) for module in model.modules()]
    with _random_states():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in wanted)
            for parameter, _ in grads:
                parameter.grad = None
            model.train(train_mode)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, grad in grads:
                parameter.grad = grad
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def _random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
