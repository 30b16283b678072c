"""Laws of what a pass leaves behind: nothing, in any module that ran, whatever happened."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from peft_sam import Loss, accumulate
from peft_sam.choosing.dense import train_densely
from peft_sam.choosing.movement import rehearse


class Counting(nn.Module):
    """Counts its calls in a buffer, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class Replacing(nn.Module):
    """Makes a table anew when it is too short, and another buffer at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.reach = 2
        self.register_buffer("table", torch.ones(2))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.reach:
            self.reach = len(x)
            self.register_buffer("table", torch.ones(self.reach))
        self.register_buffer("last", x.detach().mean(0), persistent=False)
        return self.linear(x) * self.table[: len(x), None]


class Centred(nn.Module):
    """A loss with a running centre and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.out(self.norm(x) - self.centre).square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "BatchNorm without momentum": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)),
    "a counter": lambda: nn.Sequential(Counting(), nn.Linear(4, 4)),
    "tables made anew": lambda: nn.Sequential(Replacing(), nn.Linear(4, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
}


def state(*modules: nn.Module) -> dict[str, Any]:
    """Bits of all tensors, which objects they are, modes, flags and gradients."""
    found: dict[str, Any] = {}
    for number, module in enumerate(modules):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            about = (tensor.requires_grad, id(tensor), None if tensor.grad is None else tensor.grad.tolist())
            found[f"{number} {name}"] = (tensor.detach().numpy().tobytes(), *about)
        found[f"{number} modes"] = [(name, inside.training) for name, inside in module.named_modules()]
        found[f"{number} reach"] = [getattr(inside, "reach", None) for inside in module.modules()]
    randomness = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return {**found, "randomness": randomness}


class Data:
    """Batches that can be read again and again, and an error after the last."""

    def __init__(self, then: BaseException | None = None) -> None:
        self.then = then

    def __iter__(self) -> Iterator[Tensor]:
        for n in (3, 5, 2):
            yield torch.randn(n, 4)
        if self.then is not None:
            raise self.then


def by_a_pass(model: nn.Module, data: Data, loss: Callable[[Tensor], Loss], mode: bool) -> None:
    accumulate(model, dict(model.named_parameters()), data, loss, train_mode=mode, progress=False)


def by_curvature(model: nn.Module, data: Data, loss: Callable[[Tensor], Loss], mode: bool) -> None:
    of, kinds = dict(model.named_parameters()), ["gradient", "hessian"]
    accumulate(model, of, data, loss, statistics=kinds, train_mode=mode, progress=False)


def by_a_rehearsal(model: nn.Module, data: Data, loss: Callable[[Tensor], Loss], mode: bool) -> None:
    rehearse(model, dict(model.named_parameters()), {}, data, loss, steps=5, progress=False)


WAYS = [by_a_pass, by_curvature, by_a_rehearsal]


@pytest.mark.parametrize("then", [None, KeyboardInterrupt(), RuntimeError("the disk is full")], ids=repr)
@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_everything_is_as_before(make: Any, way: Any, mode: bool, then: BaseException | None) -> None:
    model, criterion = make(), Centred()
    criterion.out.weight.grad = torch.ones(1, 4)
    model[-1].requires_grad_(False)
    before = state(model, criterion)

    def loss(x: Tensor) -> Loss:
        x = x + np.random.rand() + random.random()
        return Loss(criterion(model(x)), len(x))

    if then is None:
        way(model, Data(), loss, mode)
    else:
        with pytest.raises(type(then)):
            way(model, Data(then), loss, mode)
    after = state(model, criterion)
    assert after.keys() == before.keys()
    assert {name for name, of in after.items() if of != before[name]} == set()


def test_a_head_that_is_trained_moves_alone() -> None:
    model, criterion = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), Centred()
    data = [torch.randn(3, 4), torch.randn(5, 4)]
    before = state(model, criterion)
    head = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    train_densely(
        model, head, data, lambda x: Loss(criterion(model(x)), len(x)), what="", steps=4, lr=0.1, progress=False
    )
    after = state(model, criterion)
    assert {name for name, of in after.items() if of != before[name]} == {"0 2.weight", "0 2.bias"}


def test_gradients_of_what_the_loss_reaches_besides_are_kept_and_none_are_left() -> None:
    model, others = nn.Linear(4, 4), [nn.Linear(4, 1), nn.Linear(4, 1)]
    x = torch.randn(3, 4, requires_grad=True)
    others[0].weight.grad = torch.ones(1, 4)

    def loss(_: Any) -> Loss:
        y = model(x)
        return Loss((others[0](y) + others[1](y)).mean(), 3)

    accumulate(model, dict(model.named_parameters()), [0, 1], loss, progress=False)
    assert torch.equal(others[0].weight.grad, torch.ones(1, 4))
    assert others[0].bias.grad is others[1].weight.grad is x.grad is None
