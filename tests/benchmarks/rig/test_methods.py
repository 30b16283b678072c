"""What all of the paper's baselines have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.rig.childtuning import ChildTuning
from benchmarks.rig.diffpruning import DiffPruning
from benchmarks.rig.houlsby import HoulsbyAdapter
from benchmarks.rig.masked import candidates
from benchmarks.rig.method import Setup, named_head
from benchmarks.rig.methods_sam import SHARES, Sparse, over_its_size
from benchmarks.rig.mixout import Mixout
from peft_sam.choosing.threshold import budget_of
from tests.benchmarks.rig.methods_on_models import (
    DENSITY,
    METHODS,
    MODELS,
    SPARSE,
    STEPS,
    changed,
    logits,
    make,
    train,
    weights,
)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_before_training_the_model_is_the_pretrained_one(method: str, kind: str) -> None:
    model, setup = make(kind)
    expected = logits(model, setup)
    model = METHODS[method]().start(model, setup)
    tolerance = 1e-4 if method == "Houlsby adapter" else 0.0
    torch.testing.assert_close(logits(model, setup), expected, rtol=0, atol=tolerance)
    assert not any(module.training for module in model.modules())


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
    for name, parameter in model.named_parameters():
        if name.startswith("classifier"):
            assert (parameter != before[name]).all()
        elif not parameter.requires_grad and name in before:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("method", ["Mixout", "DiffPruning", "Houlsby adapter"])
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


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "BERT") for method in SPARSE), *zip(SPARSE, list(MODELS)[1:], strict=False)]
)
def test_a_sparse_method_ends_with_exactly_the_budget(method: str, kind: str) -> None:
    model, setup = make(kind)
    budget = budget_of(DENSITY, sum(p.numel() for p in candidates(model, setup).values()))
    before = weights(model, setup)
    ready = METHODS[method]()
    model = ready.start(model, setup)
    train(ready, model, setup, weight_decay=0.1)
    assert ready.trained(model, setup) == budget
    assert changed(model, setup, before) == budget
    assert 4 * budget < ready.stored_bytes(model, setup) < 6 * budget


def chosen(method: Sparse, kind: str) -> dict[str, tuple[int, int]]:
    """Entries and size of each tensor, with the last candidate's gradients large."""
    model, setup = make(kind)
    model.get_submodule(setup.candidates[-1]).register_full_backward_pre_hook(lambda _, grads: (30 * grads[0],))
    deltas = method.start(model, setup).base_model.sparse_deltas()
    return {name: (len(delta.indices), delta.shape.numel()) for name, delta in deltas.items()}


@pytest.mark.parametrize("kind", ["BERT", "DistilBERT"])
def test_under_a_cap_no_tensor_wins_more_than_its_share_and_those_below_it_lose_nothing(kind: str) -> None:
    free, capped = chosen(Sparse(), kind), chosen(Sparse(normalise="cap"), kind)
    limits = {name: math.ceil(SHARES * DENSITY * size) for name, (_, size) in capped.items()}
    assert any(count > limits[name] for name, (count, _) in free.items())
    assert all(count <= limits[name] for name, (count, _) in capped.items())
    assert all(capped[name][0] >= min(count, limits[name]) for name, (count, _) in free.items())
    assert sum(count for count, _ in free.values()) == sum(count for count, _ in capped.values())


@pytest.mark.parametrize("shape", [(7, 3), (5,), (1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_a_gradient_over_its_size_is_the_same_at_any_scale(shape: tuple[int, ...], scale: float) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    even = over_its_size(scale * gradient, DENSITY)
    assert even.square().mean().item() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(even, over_its_size(gradient, DENSITY))
    assert not over_its_size(torch.zeros(shape), DENSITY).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Mixout(1.0), "probability"),
        (lambda: DiffPruning(burn_in=0), "burn_in"),
        (lambda: DiffPruning(stretch=(0.0, 1.5)), "stretch"),
        (lambda: DiffPruning(project_every=0), "project_every"),
        (lambda: ChildTuning(every=0), "every"),
        (lambda: HoulsbyAdapter(0), "size"),
        (lambda: Sparse(normalise="cup").start(*make()), "normalise='cup'"),
        (lambda: Sparse(score="fisher", normalise="cap").start(*make()), "score 'sam'"),
        (lambda: HoulsbyAdapter(places=("elsewhere",)).start(*make()), r"places=\(\.\.\.\)"),
    ],
)
def test_options_out_of_range_are_named(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("names", [("bert.encoder.layer.7",), ("bert.encoder",), ()])
def test_candidates_that_the_model_has_not_are_named(names: tuple[str, ...]) -> None:
    model, setup = make()
    with pytest.raises(ValueError, match=r"no module 'bert.encoder.layer.7'|no parameter belongs"):
        candidates(model, Setup(DENSITY, 0, STEPS, setup.batches, setup.head, names))
