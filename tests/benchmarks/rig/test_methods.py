"""What all methods have in common, and what the rig's own of them compute."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from benchmarks.rig.adapters import Hybrid
from benchmarks.rig.method import named_head
from tests.benchmarks.rig.methods_on_models import DENSITY, METHODS, MODELS, logits, make, train


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_before_training_the_model_is_the_pretrained_one(method: str, kind: str) -> None:
    model, setup = make(kind)
    expected = logits(model, setup)
    model = METHODS[method]().start(model, setup)
    assert torch.equal(logits(model, setup), expected)
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str) -> None:
    model, setup = make()
    ready = METHODS[method]()
    model = ready.start(model, setup)
    for module in model.modules():  # so that the losses of a batch can be compared
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = train(ready, model, setup)
    assert sum(losses[-3:]) < sum(losses[1:4])  # of the same batches


@pytest.mark.parametrize("method", METHODS)
def test_the_head_is_trained_densely_and_nothing_outside_head_and_method_moves(method: str) -> None:
    model, setup = make()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ready = METHODS[method]()
    model = ready.start(model, setup)
    assert all(parameter.requires_grad for _, parameter in named_head(model, setup))
    assert len(list(named_head(model, setup))) == 2
    train(ready, model, setup, weight_decay=0.1)
    for wrapped, parameter in model.named_parameters():
        name = wrapped.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name.startswith("classifier"):
            assert (parameter != before[name]).all()
        elif not parameter.requires_grad and name in before:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_makes_a_method_the_same_again(method: str) -> None:
    ends = []
    for _ in range(2):
        model, setup = make()
        ready = METHODS[method]()
        model = ready.start(model, setup)
        train(ready, model, setup)
        ends.append(logits(model, setup))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", METHODS)
def test_a_started_model_can_be_copied_and_its_state_put_back(method: str) -> None:
    model, setup = make()
    ready = METHODS[method]()
    model = ready.start(model, setup)
    assert torch.equal(logits(deepcopy(model), setup), logits(model, setup))
    train(ready, model, setup)
    state, end = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model, setup)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(logits(model, setup), end)


def test_the_sparse_values_beside_pairs_have_a_rate_of_their_own() -> None:
    model, setup = make()
    ready = Hybrid(scale=0.25)
    adapted = ready.start(model, setup)
    values, others = ready.groups(adapted, lr=1e-2)
    assert (values["lr"], others["lr"]) == (0.25e-2, 1e-2)
    entries = sum(p.numel() for p in values["params"])
    assert entries == int(
        DENSITY * sum(p.numel() for n in setup.candidates for p in make()[0].get_submodule(n).parameters())
    )
    assert entries + sum(p.numel() for p in others["params"]) == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )
