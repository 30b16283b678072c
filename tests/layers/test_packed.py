"""Laws of linear layers of quantisers that are no nn.Linear, held with stand-ins of the names and fields of theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_sam import SamConfig, select_parameters

INPUTS, OUTPUTS = 12, 8


class Packed(nn.Module):
    """A linear layer whose weight is codes times a scale."""

    scales: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = INPUTS, OUTPUTS
        self.codes_of = torch.randint(-8, 8, (OUTPUTS, INPUTS))

    def dequantised(self) -> Tensor:
        return self.codes_of.float() / 16

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


class QuantizedLinear(Packed):
    """As AQLM's: integer codes and code books are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(self.codes_of.view(4, 4, 6).to(torch.int16), requires_grad=False)
        self.codebooks, self.scales = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.rand(OUTPUTS, 1))
        self.bias = nn.Parameter(torch.randn(OUTPUTS))


class EetqLinear(Packed):
    """As EETQ's: all of it is buffers, the weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", self.codes_of.t().to(torch.int8).contiguous())
        self.register_buffer("weight_scales", torch.rand(OUTPUTS))
        self.register_buffer("bias", torch.randn(OUTPUTS))


class PatchedLinear(Packed):
    """As Neural Compressor's: the weight is float8 and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(self.codes_of.t().float().to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(OUTPUTS))


class Net(nn.Module):
    """Two such layers."""

    def __init__(self, kind: type[Packed]) -> None:
        super().__init__()
        self.first, self.last = kind(), nn.Linear(OUTPUTS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("kind", [QuantizedLinear, EetqLinear, PatchedLinear])
def test_the_weight_behind_the_codes_is_a_candidate_and_its_delta_is_added_to_the_output(kind: type[Packed]) -> None:
    base, x = Net(kind), torch.randn(5, INPUTS)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model: Any = get_peft_model(copy.deepcopy(base), SamConfig(target_modules="all-linear", density=0.2))
    selection = select_parameters(model, [x], loss_fn=lambda model, x: (model(x) ** 2).sum(), progress=False)
    shapes = {name: tuple(shape) for name, shape in selection.shapes.items()}
    expected = {"first.weight": (OUTPUTS, INPUTS), "last.weight": (3, OUTPUTS), "last.bias": (3,)}
    assert shapes == expected | ({} if kind is EetqLinear else {"first.bias": (OUTPUTS,)})
    dense = copy.deepcopy(base)
    plain = nn.Linear(INPUTS, OUTPUTS)
    plain.weight, plain.bias = nn.Parameter(base.first.dequantised()), nn.Parameter(base.first.bias.detach().clone())
    dense.first = plain  # type: ignore[assignment]
    with torch.no_grad():
        for name, delta in model.base_model.sparse_deltas().items():
            delta.values.copy_(torch.randn_like(delta.values))
            dense.get_parameter(name).view(-1)[delta.indices] += delta.values
    torch.testing.assert_close(model(x), dense(x))
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    for name, delta in model.base_model.sparse_deltas().items():
        gradient = dense.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(delta.values.grad, gradient.flatten()[delta.indices])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unload().state_dict().items())


@pytest.mark.parametrize("kind", [QuantizedLinear, EetqLinear, PatchedLinear])
def test_merging_into_codes_that_nobody_can_write_is_refused(kind: type[Packed]) -> None:
    options: dict[str, Any] = {"target_modules": ["first"], "score": "random", "density": 0.2}
    model: Any = get_peft_model(Net(kind), SamConfig(**options))
    with pytest.raises(ValueError, match="in a way that cannot be written back"):
        model.merge_and_unload()
