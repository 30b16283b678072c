"""Laws of linear layers whose weight cannot be read: packed, on disk, or in pieces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import get_peft_model
from torch import Tensor, nn

from peft_sam import SamConfig, SamLayer, accumulate, select_parameters
from peft_sam.choosing.gradients import Loss
from peft_sam.choosing.linear_calls import LinearCall
from peft_sam.sparse.costs import CPU
from tests.shared.cases import Sequential, bert
from tests.shared.versions import checkpoint_activations

pytestmark = pytest.mark.on_device

CONFIG: dict[str, Any] = {"score": "random", "density": 0.2, "init_weights": False}


def adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(base, SamConfig(target_modules="all-linear", **CONFIG, **options))


def with_hidden_weight(model: Any) -> Any:
    """A copy whose linear weights are of a tensor class that nobody knows."""

    class Hidden(Tensor):
        pass

    hidden = copy.deepcopy(model)
    for layer in hidden.modules():
        if isinstance(layer, SamLayer):
            base: Any = layer.base_layer
            base.weight = nn.Parameter(base.weight.detach().as_subclass(Hidden), requires_grad=False)
    return hidden


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 400, 8)])
def test_a_hidden_weight_gives_the_outputs_and_gradients_of_a_plain_one(shape: tuple[int, ...]) -> None:
    model = adapted(Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double())
    hidden = with_hidden_weight(model)
    x, direction = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 4, dtype=torch.float64)
    gradients = []
    for of in (model, hidden):
        mine = x.clone().requires_grad_()
        y = of(mine)
        y.backward(direction)
        gradients.append(
            [y.as_subclass(Tensor), mine.grad, *(d.values.grad for d in of.base_model.sparse_deltas().values())]
        )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_model_computes_trains_and_stays_offloaded(where: str, tmp_path: Path) -> None:
    plain = bert().eval()
    base = copy.deepcopy(plain)
    if where == "memory":
        cpu_offload(base, execution_device=torch.get_default_device())
    else:
        disk_offload(base, str(tmp_path), execution_device=torch.get_default_device())
    ids, results = torch.randint(0, 50, (2, 6)), []
    for of in (plain, base):
        torch.manual_seed(1)  # the same deltas
        model = adapted(of)
        logits = model(input_ids=ids).logits
        logits.sum().backward()
        deltas = model.base_model.sparse_deltas()
        results.append((logits, {name: delta.values.grad for name, delta in deltas.items()}))
    torch.testing.assert_close(*results)
    assert all(p.is_meta for n, p in model.named_parameters() if n.endswith("base_layer.weight"))


def test_a_score_that_reads_hidden_weights_says_what_to_do() -> None:
    class Hidden(Tensor):
        pass

    base = Sequential(nn.Linear(8, 4))
    base[0].weight = nn.Parameter(base[0].weight.detach().as_subclass(Hidden), requires_grad=False)
    with pytest.raises(ValueError, match=r"'magnitude' reads the weights, but 0\.weight is quantised or offloaded"):
        get_peft_model(base, SamConfig(target_modules="all", score="magnitude", density=0.2))


def test_a_printed_layer_shows_how_its_products_are_computed() -> None:
    model = adapted(Sequential(nn.Linear(64, 64)))
    assert "default: sampled" in repr(model) or "default: submatrix" in repr(model)


# selecting


@pytest.mark.parametrize("how", ["offloaded", "checkpointed", "checkpointed, reentrant"])
def test_where_the_weights_are_does_not_change_the_selection(how: str) -> None:
    def select(base: Any) -> Any:
        model = get_peft_model(base, SamConfig(task_type="SEQ_CLS", density=0.05))
        return select_parameters(model, [classification(3), classification(4)], progress=False)

    def classification(n: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(n)
        return {"input_ids": torch.randint(1, 50, (n, 6), generator=generator), "labels": torch.arange(n) % 2}

    base = bert()
    expected = select(copy.deepcopy(base))
    if how == "offloaded":
        cpu_offload(base.bert.encoder, execution_device=torch.get_default_device())
    else:
        checkpoint_activations(base, "reentrant" in how)
    got = select(base)
    assert got.threshold == pytest.approx(expected.threshold, rel=1e-5)
    assert all(torch.equal(got.indices[name], expected.indices[name]) for name in expected.indices)


def test_a_layer_that_runs_twice_in_a_batch_adds_up_its_gradients_before_they_are_squared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).tanh())

    model, x = Twice(), torch.randn(4, 6)
    parameters = {f"linear.{name}": p for name, p in model.linear.named_parameters()}
    calls = {name: LinearCall(model.linear, name.removeprefix("linear.")) for name in parameters}
    found = [
        accumulate(
            model,
            parameters,
            [x],
            lambda x: Loss(model(x).square().mean(), 1),
            statistics=["gradient", "squared_gradient"],
            hidden=hidden,
            progress=False,
        ).tensors
        for hidden in ({}, calls)
    ]
    torch.testing.assert_close(*found)


class Stacked(torch.nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 9), torch.nn.Linear(9, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def values_changed_in_place(model: Any) -> None:
    for delta in model.base_model.sparse_deltas().values():
        delta.values.mul_(-2)


def values_in_other_memory(model: Any) -> None:
    for delta in model.base_model.sparse_deltas().values():
        delta.values.data = torch.randn(len(delta.values))


def another_support(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, SamLayer):
            for name, delta in module.deltas("default").items():
                numel = delta.shape.numel()
                support = torch.arange(numel)[numel - len(delta.values) :]
                module.set_support("default", {name: support}, {name: torch.randn(len(support))})


def another_weight(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "sam_sparse" not in name:
            parameter.data = torch.randn_like(parameter)


def another_parameter(model: Any) -> None:
    for layer in (model.get_base_model().first.base_layer, model.get_base_model().second.base_layer):
        layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)


def another_forward(model: Any) -> None:
    layer = model.get_base_model().second.base_layer
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight) * 2


def another_adapter(model: Any) -> None:
    model.add_adapter("other", SamConfig(**MANY, seed=1))
    model.set_adapter("other")


def the_same_name_again(model: Any) -> None:
    another_adapter(model)
    model.delete_adapter("default")
    model.add_adapter("default", SamConfig(**MANY, seed=2))
    model.set_adapter("default")


def a_hook_on_the_module(model: Any) -> None:
    model.get_base_model().first.base_layer.register_forward_hook(lambda module, args, output: output * 2)


def another_scale(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, SamLayer):
            module.set_scale("default", 0.5)


CHANGES: list[Any] = [
    lambda model: None,
    values_changed_in_place,
    values_in_other_memory,
    another_support,
    another_weight,
    another_parameter,
    another_forward,
    another_adapter,
    the_same_name_again,
    a_hook_on_the_module,
    lambda model: model.double(),
    lambda model: model.merge_adapter(),
    another_scale,
    lambda model: (
        model.add_adapter("other", SamConfig(**MANY, seed=1)) or model.base_model.set_adapter(["default", "other"])
    ),
]
MANY: dict[str, Any] = {
    "target_modules": ["first", "second"],
    "density": 0.3,
    "score": "random",
    "init_weights": False,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(1, 12), (1, 1, 12), (4, 12), (2, 2, 12), (5, 12)], ids=str)
@torch.no_grad()
def test_a_few_tokens_see_what_many_see_whatever_has_changed(
    shape: tuple[int, ...], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_sam.layers.few_tokens.costs_of", lambda device: CPU._replace(large=0))
    model: Any = get_peft_model(Stacked(), SamConfig(**MANY))
    x = torch.randn(shape)
    model(x)
    change(model)
    x = x.to(next(model.parameters()).dtype)
    many = model(x.reshape(-1, 12).repeat(5, 1))[: len(x.reshape(-1, 12))]
    torch.testing.assert_close(model(x), many.view(*shape[:-1], 7))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.get_base_model()(x))


@torch.no_grad()
def test_a_few_tokens_may_lie_apart_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_sam.layers.few_tokens.costs_of", lambda device: CPU._replace(large=0))
    model: Any = get_peft_model(Stacked(), SamConfig(**MANY))
    x = torch.randn(2, 12, 2).transpose(1, 2)
    torch.testing.assert_close(model(x), model(x.contiguous()))
