"""Laws of an adapter's scale: θ + s·Δ wherever Δ is, and the adapter itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sam import SamConfig
from peft_sam.layers.found import sam_layers
from tests.shared.cases import MODULES, ModuleCase, names


def adapted(base: nn.Module, case: ModuleCase) -> Any:
    options: dict[str, Any] = {"target_modules": case.target_modules, "score": "random", "init_weights": False}
    return get_peft_model(copy.deepcopy(base), SamConfig(density=0.4, **options)).eval()


def scaled(model: Any, scale: float) -> None:
    for layer in sam_layers(model).values():
        layer.set_scale("default", scale)


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_a_scaled_adapter_is_the_adapter_with_scaled_values(case: ModuleCase, tmp_path: Path) -> None:
    base, x = case.make(), case.input()
    model, expected = adapted(base, case), adapted(base, case)
    expected.load_state_dict(model.state_dict())
    values = {name: delta.values.clone() for name, delta in model.base_model.sparse_deltas().items()}
    with torch.no_grad():
        for delta in expected.base_model.sparse_deltas().values():
            delta.values.mul_(-0.75)
    plain = model(x)
    scaled(model, -0.75)
    assert torch.equal(model(x), expected(x))
    model(x).double().sin().sum().backward()
    expected(x).double().sin().sum().backward()
    for name, delta in model.base_model.sparse_deltas().items():
        torch.testing.assert_close(delta.values.grad, expected.base_model.sparse_deltas()[name].values.grad * -0.75)
    model.merge_adapter()
    expected.merge_adapter()
    assert torch.equal(model(x), expected(x))
    model.unmerge_adapter()
    for name, delta in model.base_model.sparse_deltas().items():
        assert torch.equal(delta.values, values[name])
    scaled(model, 1.0)
    assert torch.equal(model(x), plain)
    scaled(model, 0.0)
    torch.testing.assert_close(model(x), base.eval()(x))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([("scale_layer", 2.0), ("scale_layer", 3.0)], 6.0),
        ([("set_scale", 5.0), ("scale_layer", 2.0), ("unscale_layer", 4.0)], 2.5),
        ([("set_scale", 5.0), ("unscale_layer", None)], 1.0),
        ([("scale_layer", 2.0), ("set_scale", 3.0)], 3.0),
    ],
)
def test_scales_multiply_and_go_as_those_of_lora_layers(steps: list[tuple[str, Any]], expected: float) -> None:
    case = MODULES[0]
    base, x = case.make(), case.input()
    model, other = adapted(base, case), adapted(base, case)
    other.load_state_dict(model.state_dict())
    for layer in sam_layers(model).values():
        for name, number in steps:
            act: Callable[..., None] = getattr(layer, name)
            act("default", number) if name == "set_scale" else act(number)
    scaled(other, expected)
    assert torch.equal(model(x), other(x))


def test_a_deleted_adapter_leaves_no_scale_to_the_next_of_its_name() -> None:
    case = MODULES[0]
    base, x = case.make(), case.input()
    model = adapted(base, case)
    model.add_adapter("second", SamConfig(target_modules="all", score="random", density=0.4, init_weights=False))
    scaled(model, 3.0)
    model.set_adapter("second")
    model.delete_adapter("default")
    model.add_adapter("default", SamConfig(target_modules="all", score="random", density=0.4, init_weights=False))
    assert all(not layer.scaling for layer in sam_layers(model).values())
    assert model(x).isfinite().all()
