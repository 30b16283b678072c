"""Laws of the curvature that Theorem 3 divides by."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from peft_sam import SamConfig, accumulate, select_parameters
from peft_sam.choosing.curvature import damped, signs
from peft_sam.choosing.gradients import Loss
from tests.shared.cases import NETS, NetCase, llama, names


class Quadratic(nn.Module):
    """L(w) = ½ Σ h_i (w_i - c_i)², whose Hessian is diag(h)."""

    class Inner(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(size))

        def forward(self) -> Tensor:
            return self.weight

    def __init__(self, h: Tensor, c: Tensor) -> None:
        super().__init__()
        self.inner, self.h, self.c = self.Inner(len(h)), h, c

    def forward(self) -> Tensor:
        return 0.5 * (self.h * (self.inner() - self.c).square()).sum()


def hessian_diagonal(loss: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The slow obvious way: one row of the Hessian after the other."""
    value = loss()
    gradients = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True)
    found = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        rows = torch.zeros(parameter.numel(), dtype=parameter.dtype)
        for i in range(parameter.numel() if gradient is not None and gradient.requires_grad else 0):
            row = torch.autograd.grad(gradient.flatten()[i], parameter, retain_graph=True, allow_unused=True)[0]
            rows[i] = 0.0 if row is None else row.flatten()[i]
        found[name] = rows.view(parameter.shape)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_selected_mask_attains_the_minimum_over_all_masks_of_a_quadratic(seed: int) -> None:
    torch.manual_seed(seed)
    h, c, k = torch.rand(8) * 5 + 0.05, torch.randn(8), 3
    model = Quadratic(h, c)
    start = model.inner.weight.detach().clone()

    def lowest(mask: tuple[int, ...]) -> float:
        w = start.clone()
        w[list(mask)] = c[list(mask)]  # the minimum over the masked entries
        return float(0.5 * (h * (w - c).square()).sum())

    best = min(itertools.combinations(range(8), k), key=lowest)
    adapted = get_peft_model(
        model,
        SamConfig(
            target_modules=["inner"],
            score="sam_curvature",
            curvature="hutchinson",
            probes=1,
            damping=1e-9,
            density=k / 8,
        ),
    )
    selection = select_parameters(adapted, [None], loss_fn=lambda model, batch: model(), count_fn=lambda batch: 1)
    assert tuple(selection.indices["inner.weight"].tolist()) == best


def test_one_probe_is_exact_where_the_hessian_is_diagonal() -> None:
    h = torch.rand(20) + 0.1
    model = Quadratic(h, torch.randn(20))
    found = accumulate(
        model,
        dict(model.named_parameters()),
        [0, 1],
        lambda _: Loss(model(), 2),
        statistics=["hessian"],
        progress=False,
    )
    torch.testing.assert_close(found.tensors["hessian"]["inner.weight"], h)


def test_many_probes_come_close_to_the_exact_diagonal_of_a_net() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randint(0, 2, (10,))
    parameters = dict(model.named_parameters())
    exact = hessian_diagonal(lambda: nn.functional.cross_entropy(model(x), y), parameters)
    errors = []
    for probes in (20, 2000):
        found = accumulate(
            model,
            parameters,
            [slice(0, 4), slice(4, 10)],
            lambda part: Loss(nn.functional.cross_entropy(model(x[part]), y[part]), len(y[part])),
            statistics=["gradient", "hessian"],
            probes=probes,
            progress=False,
        ).tensors["hessian"]
        errors.append(sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5)
    scale = sum(float(tensor.square().sum()) for tensor in exact.values()) ** 0.5
    assert errors[1] < errors[0] / 4  # ten times less is expected
    assert errors[1] < 0.1 * scale


@pytest.mark.parametrize("curvature", ["fisher", "hutchinson"])
@pytest.mark.parametrize("case", NETS[:5], ids=names)
def test_a_net_is_selected_by_its_curvature(case: NetCase, curvature: str) -> None:
    config = SamConfig(task_type=case.task_type, score="sam_curvature", curvature=curvature, density=0.05)
    model = get_peft_model(case.make(), config)
    selection = select_parameters(model, [case.batch(2), case.batch(3)], progress=False)
    candidates = sum(shape.numel() for shape in selection.shapes.values())
    assert sum(len(indices) for indices in selection.indices.values()) == int(candidates * 0.05)
    assert all(p.grad is None for p in model.parameters())


@given(st.floats(1e-6, 10), st.booleans())
def test_damping_makes_every_curvature_positive_and_keeps_the_order_of_its_size(damping: float, absolute: bool) -> None:
    diagonal = {"a": torch.randn(50), "b": torch.zeros(3)}
    found = damped(diagonal, damping, absolute)
    mean = torch.cat([t.abs() for t in diagonal.values()]).mean()
    added = damping if absolute else damping * mean
    for name, tensor in diagonal.items():
        torch.testing.assert_close(found[name], tensor.abs() + added)
        assert bool((found[name] > 0).all())


def test_no_curvature_at_all_is_still_positive() -> None:
    assert float(damped({"a": torch.zeros(2)}, 0.1, False)["a"].min()) > 0


def test_probes_are_signs_that_differ_by_probe_parameter_and_seed() -> None:
    like = torch.zeros(200)
    vectors = [
        signs(name, like, probe, seed) for name, probe, seed in [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]
    ]
    assert all(set(vector.tolist()) == {-1.0, 1.0} for vector in vectors)
    assert len({tuple(vector.tolist()) for vector in vectors}) == 4
    assert torch.equal(vectors[0], signs("a", like, 0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "exact"}, r"curvature must be one of \['fisher', 'hutchinson'\]; got 'exact'"),
        ({"probes": 0}, "probes must be a positive integer; got 0"),
        ({"damping": 0}, "damping must be a positive number; got 0"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamConfig(score="sam_curvature", **options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_second_derivatives_pass_checkpoints_that_are_not_reentrant_alone(reentrant: bool) -> None:
    base, batch = llama(), {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    config = SamConfig(
        density=0.05, score="sam_curvature", curvature="hutchinson", target_modules=["q_proj", "lm_head"]
    )
    plain, model = (get_peft_model(copy.deepcopy(base), config) for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant:
        with pytest.raises(ValueError, match="reentrant checkpoints, which no second derivative passes"):
            select_parameters(model, [batch], train_mode=True, progress=False)
    else:
        one, other = (select_parameters(of, [batch], train_mode=True, progress=False) for of in (plain, model))
        assert all(torch.equal(one.indices[name], found) for name, found in other.indices.items())
