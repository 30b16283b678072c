"""Laws of float16: small gradients do not vanish, and what a plain backward pass holds does not overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_sam import Loss, accumulate
from peft_sam.choosing.dense import train_densely
from peft_sam.choosing.linear_calls import LinearCall

# of the outputs: up to which a plain backward pass in float16 holds the gradients, and one that is scaled by 1,024 not
FACTORS = [1e-6, 1.0, 30.0, 1000.0]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    return [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (4, 7, 2)]


def statistics(model: nn.Module, factors: list[float], **options: Any) -> dict[str, dict[str, Tensor]]:
    of = iter(factors)

    def loss(x: Tensor) -> Loss:
        nonlocal last, factor
        if x is not last:
            last, factor = x, next(of)
        y = model(x.to(next(model.parameters()).dtype))
        return Loss((y * factor).float().sum(1).mean(), len(x))

    last, factor = None, 0.0
    found = accumulate(model, dict(model.named_parameters()), batches(), loss, progress=False, **options)
    return found.tensors


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("kinds", [["gradient"], ["squared_gradient"], ["gradient", "squared_gradient"]])
@pytest.mark.parametrize("factors", [[f] * 3 for f in FACTORS] + [[1.0, 1000.0, 1e-3], [1000.0, 1.0, 30.0]])
def test_half_precision_finds_what_float32_finds(factors: list[float], kinds: list[str], train_mode: bool) -> None:
    found = []
    for dtype in (torch.float16, torch.float32):
        model = net().to(torch.float16).to(dtype)
        torch.manual_seed(1)
        found.append(statistics(model, factors, statistics=kinds, train_mode=train_mode))
    half, single = found
    for kind in kinds:
        for name, expected in single[kind].items():
            error = (half[kind][name] - expected).norm() / expected.norm()
            assert float(error) < 0.02, (kind, name)


def test_layers_seen_through_their_calls_are_added_once_though_a_batch_comes_again() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False)).half()
    shared = model[0]
    hidden = {"0.weight": LinearCall(shared, "weight")}

    def loss(x: Tensor) -> Loss:
        y = model(shared(x.half()))
        return Loss(3000 * y.float().sum(1).mean(), len(x))

    found, plain = (
        accumulate(model, dict(model.named_parameters()), batches(), loss, hidden=calls, progress=False)
        for calls in (hidden, {})
    )
    for name, expected in plain.tensors["gradient"].items():
        torch.testing.assert_close(
            found.tensors["gradient"][name], expected, rtol=2e-2, atol=2e-2 * expected.abs().max()
        )


def test_what_a_plain_backward_pass_does_not_hold_is_an_error() -> None:
    model = net().half()

    def loss(x: Tensor) -> Loss:
        return Loss((model(x.half()).float() * 1e6).sum(1).mean(), len(x))

    with pytest.raises(FloatingPointError, match="in batch 0 has NaN or infinite entries"):
        accumulate(model, dict(model.named_parameters()), batches(), loss, progress=False)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_head_in_half_precision_is_trained_where_scaled_gradients_would_overflow(factor: float) -> None:
    found = []
    for dtype in (torch.float16, torch.float32):
        model = net().to(torch.float16).to(dtype)
        head = {name: p for name, p in model.named_parameters() if name.startswith("4.")}

        def loss(x: Tensor, model: nn.Module = model) -> Loss:
            return Loss((model(x.to(next(model.parameters()).dtype)) * factor).float().sum(1).mean(), len(x))

        options: dict[str, Any] = {"what": "", "steps": 3, "lr": 0.1, "progress": False}
        found.append(train_densely(model, head, batches(), loss, **options).weights)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_a_gradient_that_is_no_number_ends_a_warm_up_with_an_error() -> None:
    model = net()
    head = {name: p for name, p in model.named_parameters() if name.startswith("4.")}

    def loss(x: Tensor) -> Loss:
        return Loss(model(x).square().mean(), len(x))

    for parameter in head.values():
        parameter.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="a gradient of step 0 of the head is NaN or infinite"):
        train_densely(model, head, batches(), loss, what="the head", steps=3, lr=0.1, progress=False)
