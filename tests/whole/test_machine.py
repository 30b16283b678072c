"""A law of any order: whatever is done to adapters one after the other, the model is the dense one.

The oracle holds the base's bits, each adapter's sparse Δ as a dense tensor, and A and B of its low-rank pairs. After
every step the model's parameters, its deltas, its outputs and the bits of the base are compared with it.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_sam import SamConfig, select_parameters
from peft_sam.layers.found import module_of, pairs_of
from tests.shared.reference import dense_delta

Dense = dict[str, Tensor]
NAMES = ["default", "b", "c", "d"]
ROWS = torch.arange(12).view(4, 3) % 7
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
RATE = 0.1


class Net(nn.Module):
    """A table, a norm, a linear layer called twice, and one whose weight is read and not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.twice, self.read, self.out = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, rows: Tensor, x: Tensor) -> Tensor:
        y = self.norm(self.table(rows).mean(1) + x)
        y = self.twice(torch.tanh(self.twice(y)))
        return self.out(torch.tanh(nn.functional.linear(y, self.read.weight, self.read.bias)))


BASE = Net()


def loss_of(model: nn.Module) -> Tensor:
    return model(ROWS, X).square().mean()


def own_parameters(model: nn.Module) -> Dense:
    """The base's own, by name in the unwrapped model."""
    found = {}
    for name, parameter in model.named_parameters():
        if "sam_sparse_" not in name:
            module, _, leaf = name.rpartition(".")
            found[f"{module_of(module)}.{leaf}"] = parameter.detach()
    return found


class AnyOrder(RuleBasedStateMachine):
    """The adapters of one model, and what a dense model would hold."""

    @initialize(seed=st.integers(0, 5))
    def start(self, seed: int) -> None:
        """One adapter, which is active."""
        self.model: Any = get_peft_model(copy.deepcopy(BASE), self.config(0.2, seed))
        self.deltas: dict[str, Dense] = {}
        self.pairs: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        self.active, self.merged = ["default"], list[str]()
        self.take("default")

    def config(self, density: float, seed: int, **options: Any) -> SamConfig:
        chosen = {"score": "random", "seed": seed, "init_weights": False, **options}
        return SamConfig(target_modules="all", density=density, **chosen)

    def take(self, name: str) -> None:
        """Believe the model's word on an adapter that is new."""
        self.deltas[name] = {key: dense_delta(delta) for key, delta in self.sparse(name).items()}
        self.supports = getattr(self, "supports", {})
        self.supports[name] = {key: delta.indices.clone() for key, delta in self.sparse(name).items()}
        self.pairs[name] = {
            f"{module}.weight": (pair.lora_A.detach().clone(), pair.lora_B.detach().clone(), pair.alpha / pair.r)
            for module, pair in pairs_of(self.model, name).items()
        }

    def change(self, name: str) -> Dense:
        """Δ of an adapter, its pairs included."""
        found = dict(self.deltas[name])
        for key, (a, b, scale) in self.pairs[name].items():
            found[key] = found.get(key, 0) + scale * b @ a
        return found

    def sparse(self, name: str) -> Any:
        return self.model.base_model.sparse_deltas(name)

    def free(self) -> str | None:
        return next((name for name in NAMES if name not in self.deltas), None)

    def dense(self, names: list[str]) -> Dense:
        """θ⁰ + Σ Δ."""
        found = {name: parameter.detach().clone() for name, parameter in BASE.named_parameters()}
        for name in names:
            for key, delta in self.change(name).items():
                found[key] = found[key] + delta
        return found

    # What is done

    @precondition(lambda self: self.free())
    @rule(density=st.sampled_from([0.05, 0.3, 1.0]), seed=st.integers(0, 5), r=st.sampled_from([None, 1, 3]))
    def add(self, density: float, seed: int, r: int | None) -> None:
        name = self.free()
        self.model.add_adapter(name, self.config(density, seed, r=r))
        self.merged = []  # PEFT unmerges first
        self.take(str(name))

    @precondition(lambda self: self.free() and not self.merged)
    @rule(density=st.sampled_from([0.05, 0.2]), r=st.sampled_from([None, 2]))
    def add_and_select(self, density: float, r: int | None) -> None:
        name = self.free()
        self.model.add_adapter(name, self.config(density, 0, score="sam", init_weights=True, r=r))
        selection = select_parameters(
            self.model, [0], adapter_name=name, loss_fn=lambda model, _: loss_of(model), progress=False
        )
        self.take(str(name))
        assert sum(map(len, self.supports[str(name)].values())) == selection.k
        assert not any(bool(delta.any()) for delta in self.change(str(name)).values())

    def idle(self) -> list[str]:
        """Adapters that are not active; nor the one that PeftModel goes on to name where they are others."""
        return sorted(set(self.deltas) - {*self.active, self.model.active_adapter})

    @precondition(lambda self: self.idle() and not self.merged)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.idle()))
        self.model.delete_adapter(name)
        del self.deltas[name], self.supports[name], self.pairs[name]

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        self.active = [data.draw(st.sampled_from(sorted(self.deltas)))]
        self.model.set_adapter(self.active[0])
        self.merged = []

    @precondition(lambda self: len(self.deltas) > 1)
    @rule(data=st.data())
    def activate_two(self, data: st.DataObject) -> None:
        self.active = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=2, max_size=2, unique=True))
        self.model.base_model.set_adapter(self.active)
        self.merged = []

    @precondition(lambda self: not self.merged)
    @rule(safe=st.booleans())
    def merge(self, safe: bool) -> None:
        self.model.merge_adapter(safe_merge=safe)
        self.merged = list(self.active)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @precondition(lambda self: not self.merged)
    @rule()
    def train(self) -> None:
        """A step along the gradient of the dense oracle, at the support."""
        parameters = {key: p.requires_grad_() for key, p in self.dense(self.active).items()}
        functional = torch.func.functional_call(BASE, parameters, (ROWS, X))
        names = list(parameters)
        gradients = torch.autograd.grad(functional.square().mean(), [parameters[key] for key in names])
        self.model.train()
        trained = [p for n, p in self.model.named_parameters() if p.requires_grad]
        loss_of(self.model).backward()
        torch.optim.SGD(trained, lr=RATE).step()
        self.model.zero_grad()
        for name in self.active:
            for key, gradient in zip(names, gradients, strict=True):
                if key in self.supports[name]:
                    at = self.supports[name][key]
                    self.deltas[name][key].flatten()[at] -= RATE * gradient.flatten()[at]
                if key in self.pairs[name]:
                    a, b, scale = self.pairs[name][key]
                    step = RATE * scale * gradient
                    self.pairs[name][key] = (a - b.t() @ step, b - step @ a.t(), scale)

    @precondition(lambda self: self.free())
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        """An adapter comes back under another name, also one that is saved while merged."""
        name, new = data.draw(st.sampled_from(sorted(self.deltas))), str(self.free())
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            path = folder if name == "default" else f"{folder}/{name}"
            self.model.load_adapter(path, new)
            alone = PeftModel.from_pretrained(copy.deepcopy(BASE), path)
        with torch.no_grad():
            torch.testing.assert_close(alone(ROWS, X), self.outputs([name]), rtol=1e-4, atol=1e-5)
        self.merged = []
        self.deltas[new] = {key: delta.clone() for key, delta in self.deltas[name].items()}
        self.supports[new], self.pairs[new] = dict(self.supports[name]), dict(self.pairs[name])

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: self.free() and len(self.deltas) > 1 and not self.merged)
    @rule(data=st.data(), weights=st.tuples(st.sampled_from([1.0, -0.5]), st.sampled_from([0.25, 2.0])))
    def combine(self, data: st.DataObject, weights: tuple[float, float]) -> None:
        of = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=2, max_size=2, unique=True))
        new = str(self.free())
        self.model.add_weighted_adapter(of, list(weights), new, combination_type="linear")
        expected: Dense = {}
        for name, weight in zip(of, weights, strict=True):
            for key, delta in self.change(name).items():
                expected[key] = expected.get(key, torch.zeros_like(delta)) + weight * delta
        self.take(new)
        torch.testing.assert_close(self.change(new), expected)

    @precondition(lambda self: not self.merged)
    @rule()
    def disable_for_a_while(self) -> None:
        with self.model.disable_adapter(), torch.no_grad():
            assert torch.equal(self.model(ROWS, X), BASE(ROWS, X))

    # What holds always

    def outputs(self, names: list[str]) -> Tensor:
        return torch.func.functional_call(BASE, self.dense(names), (ROWS, X)).detach()

    @invariant()
    def the_deltas_are_those_of_the_oracle(self) -> None:
        for name, expected in self.deltas.items():
            found = self.sparse(name)
            assert {key: d.indices.tolist() for key, d in found.items()} == {
                key: at.tolist() for key, at in self.supports[name].items()
            }
            torch.testing.assert_close(
                {key: dense_delta(d) for key, d in found.items()}, expected, rtol=1e-4, atol=1e-6
            )
            pairs = {f"{module}.weight": pair for module, pair in pairs_of(self.model, name).items()}
            assert pairs.keys() == self.pairs[name].keys()
            for key, (a, b, _) in self.pairs[name].items():
                torch.testing.assert_close([pairs[key].lora_A, pairs[key].lora_B], [a, b], rtol=1e-4, atol=1e-6)

    @invariant()
    def the_base_has_its_bits_unless_merged_and_then_the_sum(self) -> None:
        found = own_parameters(self.model)
        if self.merged:
            torch.testing.assert_close(found, self.dense(self.merged), rtol=1e-4, atol=1e-6)
        else:
            assert all(torch.equal(found[name], parameter) for name, parameter in BASE.named_parameters())

    @invariant()
    def the_outputs_are_those_of_the_dense_model(self) -> None:
        with torch.no_grad():
            found = self.model(ROWS, X)
        torch.testing.assert_close(found, self.outputs(self.merged or self.active), rtol=1e-4, atol=1e-5)

    @invariant()
    def the_active_adapters_are_trained_and_no_others(self) -> None:
        assert sorted(self.model.active_adapters) == sorted(self.active)
        for name in self.deltas:
            pairs = [p for pair in pairs_of(self.model, name).values() for p in pair.parameters()]
            values = [d.values for d in self.sparse(name).values()]
            assert {p.requires_grad for p in values + pairs} == {name in self.active}

    def teardown(self) -> None:
        """Unloading gives the base back, bit for bit."""
        if hasattr(self, "model"):
            if self.merged:
                self.model.unmerge_adapter()
            unloaded = dict(self.model.unload().named_parameters())
            assert all(torch.equal(unloaded[name], parameter) for name, parameter in BASE.named_parameters())


TestAnyOrder = pytest.mark.filterwarnings("ignore::UserWarning")(AnyOrder.TestCase)
TestAnyOrder.settings = settings(max_examples=12, stateful_step_count=10, deadline=None)
