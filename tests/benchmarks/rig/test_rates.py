"""Laws of the learning rates that entries have of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.rig.rates import WIDEST, Rates
from peft_sam import SamConfig


class Net(nn.Module):
    """Two linear layers and a squared loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.second(self.first(x).tanh()).square().mean())


def adapted() -> Any:
    return get_peft_model(Net(), SamConfig(density=0.7, score="random", target_modules=["first", "second"]))


def batches() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_a_step_is_as_small_as_the_second_moments_of_input_and_gradient_say_and_of_the_same_geometric_mean(
    power: float,
) -> None:
    model, net = adapted(), Net()
    rates = Rates(model, batches(), 2, power)
    inputs: dict[str, Any] = {"first": 0.0, "second": 0.0}
    outputs: dict[str, Any] = {"first": 0.0, "second": 0.0}
    for batch in batches()[:2]:
        between = net.first(batch["x"])
        after = net.second(between.tanh())
        grads = torch.autograd.grad(after.square().mean(), [between, after])
        for name, x, grad in (("first", batch["x"], grads[0]), ("second", between.tanh(), grads[1])):
            inputs[name] += x.square().sum(0)
            outputs[name] += grad.square().sum(0)
    deltas = {key: delta for key, delta in model.base_model.sparse_deltas().items() if len(delta.values)}
    every = {f"{name}.weight": torch.outer(outputs[name], inputs[name]).flatten() for name in inputs}
    every["first.bias"] = outputs["first"]
    assert set(deltas) == set(every)
    curvature = {name: every[name][delta.indices] for name, delta in deltas.items()}
    mean = torch.cat(list(curvature.values())).log().mean()
    assert all(delta.values.grad is None for delta in deltas.values())
    with torch.no_grad():
        for delta in deltas.values():
            delta.values.add_(1)
    rates.step()
    for name, delta in deltas.items():
        expected = ((curvature[name].log() - mean) * -power).exp()
        assert expected.max() < WIDEST
        torch.testing.assert_close(delta.values.detach(), expected.detach())
