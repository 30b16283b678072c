"""Each of the paper's baselines: what it trains, and what its definition promises."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.rig.childtuning import ChildTuning
from benchmarks.rig.diffpruning import DiffPruning, hard_concrete, likely_gate, open_probability
from benchmarks.rig.houlsby import INIT, HoulsbyAdapter
from benchmarks.rig.masked import candidates
from benchmarks.rig.method import Setup, named_head
from benchmarks.rig.mixout import Mixout
from peft_sam.choosing.threshold import budget_of
from tests.benchmarks.rig.methods_on_models import DENSITY, METHODS, STEPS, changed, logits, make, train, weights


@pytest.mark.parametrize("method", ["Child-Tuning_D", "ChildPruning, every 3 steps"])
def test_child_tuning_changes_no_more_than_its_budget_at_any_step(method: str) -> None:
    model, setup = make()
    before = weights(model, setup)
    ready = METHODS[method]()
    ready.start(model, setup)
    masks, after_step, counts = [], ready.after_step, []

    def watched(model: nn.Module, step: int) -> None:
        after_step(model, step)
        masks.append(deepcopy(ready.masked.masks))
        counts.append(changed(model, setup, before))
        for name, tensor in weights(model, setup).items():
            assert not ((tensor != before[name]) & ~masks[-1][name]).any()

    ready.after_step = watched  # type: ignore[method-assign]
    train(ready, model, setup, weight_decay=0.1)
    assert max(counts) <= ready.trained(model, setup)
    differ = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(masks)]
    assert [step + 1 for step, changes in enumerate(differ) if changes] == ([] if ready.every is None else [2, 5])


def test_child_tuning_chooses_the_largest_mean_squared_batch_gradients() -> None:
    model, setup = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = candidates(model, setup)
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in setup.batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(parameters.values()))
        for square, gradient in zip(fisher.values(), gradients, strict=True):
            square += gradient**2 / 3
    flat = torch.cat([square.flatten() for square in fisher.values()])
    ready = ChildTuning()
    ready.start(model, setup)
    mask = torch.cat([ready.masked.masks[name].flatten() for name in fisher])
    assert flat[mask].min() >= flat[~mask].max()
    assert mask.sum() == budget_of(DENSITY, len(mask))


def test_child_tuning_keeps_the_optimizer_s_moments_zero_outside_the_mask() -> None:
    model, setup = make()
    ready = ChildTuning()
    ready.start(model, setup)
    optimizer = torch.optim.AdamW(ready.groups(model, 1e-2))
    model(**setup.batches[0]).loss.backward()
    ready.after_backward(model, 0)
    optimizer.step()
    for name, mask in ready.masked.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        assert not state["exp_avg"][~mask].any()
        assert not state["exp_avg_sq"][~mask].any()
        assert state["exp_avg"][mask].any() or not mask.any()


def test_the_mean_of_mixout_s_weights_over_its_draws_is_the_weight() -> None:
    model, setup = make()
    ready, probability, draws = Mixout(0.7), 0.7, 1000
    name = setup.candidates[0]
    ready.start(model, setup)
    layer = model.get_submodule(name)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn_like(before))
    weight = layer.weight.detach().clone()  # in eval mode
    assert torch.equal(weight, layer.parametrizations.weight.original)
    layer.train()
    drawn = torch.stack([layer.weight.detach() for _ in range(draws)])
    moved = weight - before
    deviation = (probability / (1 - probability) / draws) ** 0.5 * moved.abs()
    assert ((drawn.mean(0) - weight).abs() <= 5 * deviation + 1e-6).all()
    # each draw is W⁰ − q/(1 − q) · 0 moved entries, by the definition with d of 0 and 1
    kept = (drawn - before).abs() > 0.5 * moved.abs()
    for d, found in ((0.0, kept), (1.0, ~kept)):
        value = (d * before + (1 - d) * weight - probability * before) / (1 - probability)
        torch.testing.assert_close(drawn[found], value.expand_as(drawn)[found], rtol=1e-4, atol=1e-5)
    assert float(kept.float().mean()) == pytest.approx(1 - probability, abs=0.005)


def test_mixout_with_probability_zero_is_plain_fine_tuning() -> None:
    ends = []
    for mix in (False, True):
        model, setup = make()
        ready = Mixout(0.0)
        if mix:
            ready.start(model, setup)
            assert ready.trained(model, setup) == sum(p.numel() for p in model.parameters()) - 2 * 16 - 2
            assert ready.stored_bytes(model, setup) == 4 * ready.trained(model, setup)
        torch.manual_seed(1)
        train(ready, model, setup)
        ends.append(logits(model, setup))
    assert torch.equal(*ends)


@pytest.mark.parametrize("stretch", [(-1.5, 1.5), (-0.1, 1.1), (-0.5, 3.0)])
def test_the_open_probability_of_a_gate_is_the_share_of_its_draws_that_are_not_zero(
    stretch: tuple[float, float],
) -> None:
    draws = 20_000
    log_alpha = torch.linspace(-4, 4, 9)
    drawn = hard_concrete(log_alpha, torch.rand(draws, 9).clamp(1e-6, 1 - 1e-6), *stretch)
    expected = open_probability(log_alpha, *stretch)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert (((drawn != 0).float().mean(0) - expected).abs() <= 4 * deviation + 1e-4).all()
    assert drawn.min() == 0
    assert drawn.max() == 1
    torch.testing.assert_close(likely_gate(log_alpha, *stretch), hard_concrete(log_alpha, torch.tensor(0.5), *stretch))


def test_diff_pruning_s_penalty_is_the_expected_number_of_open_gates_until_the_mask_is_fixed() -> None:
    model, setup = make()
    ready = DiffPruning(penalty=0.5, log_alpha=0.25, stretch=(-0.1, 1.1))
    entries = sum(p.numel() for p in candidates(model, setup).values())
    ready.start(model, setup)
    expected = 0.5 * entries * open_probability(torch.tensor(0.25), -0.1, 1.1)
    torch.testing.assert_close(ready.penalty(model, 0), expected, rtol=1e-5, atol=0)
    train(ready, model, setup)
    assert ready.penalty(model, STEPS) is None


def test_diff_pruning_keeps_the_largest_differences_and_trains_them_on() -> None:
    model, setup = make()
    before = weights(model, setup)
    ready = DiffPruning(burn_in=0.5)
    ready.start(model, setup)
    at: dict[str, Any] = {}
    after_step = ready.after_step

    def watched(model: nn.Module, step: int) -> None:
        if step == 3:
            model.eval()
            at["gated"] = weights(model, setup)
            model.train()
        after_step(model, step)
        at.setdefault("settled", []).append(ready.settled(model, step + 1))
        if step == 3:
            at["projected"] = weights(model, setup)

    ready.after_step = watched  # type: ignore[method-assign]
    train(ready, model, setup)
    assert at.pop("settled") == [False] * 3 + [True] * 5
    flat = {
        kind: torch.cat([(tensors[n] - before[n]).flatten() for n in before])
        for kind, tensors in {**at, "end": weights(model, setup)}.items()
    }
    kept = flat["projected"] != 0
    assert int(kept.sum()) == ready.trained(model, setup) == budget_of(DENSITY, len(kept))
    assert flat["gated"][kept].abs().min() >= flat["gated"][~kept].abs().max()
    torch.testing.assert_close(flat["projected"][kept], flat["gated"][kept])
    assert not flat["end"][~kept].any()
    assert (flat["end"][kept] != flat["projected"][kept]).float().mean() > 0.9


def test_diff_pruning_projected_again_and_again_is_sparse_at_these_steps_and_dense_between() -> None:
    model, setup = make()
    before = weights(model, setup)
    ready = DiffPruning(burn_in=1.0, project_every=3)
    ready.start(model, setup)
    counts, after_step = [], ready.after_step

    def watched(model: nn.Module, step: int) -> None:
        after_step(model, step)
        model.eval()
        counts.append(changed(model, setup, before))
        model.train()

    ready.after_step = watched  # type: ignore[method-assign]
    train(ready, model, setup)
    budget = ready.trained(model, setup)
    sparse = [step for step, count in enumerate(counts) if count <= budget]
    assert sparse == [2, 5, STEPS - 1]


def test_diff_pruning_that_ends_within_its_burn_in_is_pruned_at_the_end() -> None:
    model, setup = make()
    before = weights(model, setup)
    ready = DiffPruning(burn_in=0.5)
    ready.start(model, Setup(DENSITY, 0, 100, setup.batches, setup.head, setup.candidates))
    train(ready, model, setup)
    assert changed(model, setup, before) == ready.trained(model, setup)
    assert ready.trained(model, setup) == budget_of(DENSITY, sum(tensor.numel() for tensor in before.values()))


@pytest.mark.parametrize(("kind", "norms"), [("BERT", 5), ("RoBERTa", 5), ("DistilBERT", 5)])
def test_an_adapter_has_two_bottlenecks_in_each_layer_and_trains_the_norms(kind: str, norms: int) -> None:
    model, setup = make(kind)
    size, hidden, layers = 3, 16, 2
    ready = HoulsbyAdapter(size)
    model = ready.start(model, setup)
    expected = 2 * layers * (2 * hidden * size + size + hidden) + norms * 2 * hidden
    assert ready.trained(model, setup) == expected
    assert ready.stored_bytes(model, setup) == 4 * expected
    head = sum(parameter.numel() for _, parameter in named_head(model, setup))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + head


def test_an_adapter_begins_near_the_identity_and_is_the_bottleneck_of_its_definition() -> None:
    model, setup = make()
    name = "bert.encoder.layer.1.output.dense"
    x = torch.randn(4, 32)
    expected = model.get_submodule(name)(x)
    model = HoulsbyAdapter(size=5).start(model, setup)
    place = model.get_submodule(name)
    torch.testing.assert_close(
        place(x), expected, rtol=0, atol=16 * 5 * 4 * INIT**2 * float(expected.detach().abs().max())
    )
    down, up = place[1].down, place[1].up
    with torch.no_grad():
        for parameter in place[1].parameters():
            parameter.normal_()
    hidden = nn.functional.gelu(expected @ down.weight.T + down.bias)
    torch.testing.assert_close(place(x), expected + hidden @ up.weight.T + up.bias)
