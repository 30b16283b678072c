"""Diff pruning: what its definition promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.rig.diffpruning import DiffPruning, candidates, hard_concrete, likely_gate, open_probability
from peft_sam.choosing.threshold import budget_of
from tests.benchmarks.rig.methods_on_models import DENSITY, METHODS, PRUNING, STEPS, changed, make, train, weights


@pytest.mark.parametrize("kind", ["BERT", "RoBERTa", "DistilBERT"])
@pytest.mark.parametrize("method", PRUNING)
def test_it_ends_with_exactly_the_budget(method: str, kind: str) -> None:
    model, setup = make(kind)
    budget = budget_of(DENSITY, sum(p.numel() for p in candidates(model, setup).values()))
    before = weights(model, setup)
    ready = METHODS[method]()
    model = ready.start(model, setup)
    train(ready, model, setup, weight_decay=0.1)
    assert ready.trained(model, setup) == budget
    assert changed(model, setup, before) == budget
    assert 4 * budget < ready.stored_bytes(model, setup) < 6 * budget


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
    ready = DiffPruning()
    ready.weight, ready.log_alpha, ready.stretch = 0.5, 0.25, (-0.1, 1.1)  # type: ignore[misc]
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


@pytest.mark.parametrize(
    ("options", "message"), [({"burn_in": 0}, "burn_in"), ({"project_every": 0}, "project_every")], ids=str
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffPruning(**options)
