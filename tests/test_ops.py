"""Laws of the products with W + Δ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from peft_sam import ops
from peft_sam.delta import SparseDelta
from peft_sam.ops import compose, composes, sparse_linear
from peft_sam.plan import plan_linear
from tests.reference import dense_delta


def make_delta(shape: tuple[int, int], positions: list[int], dtype: torch.dtype = torch.float64) -> SparseDelta:
    indices = torch.tensor(sorted(set(positions)), dtype=torch.int64)
    return SparseDelta(torch.Size(shape), indices, torch.randn(len(indices), dtype=dtype))


@st.composite
def linear_problems(draw: Any) -> tuple[Tensor, Tensor, list[SparseDelta], bool]:
    """x, a weight, one to three deltas of any clustering, and whether the weight is stored transposed."""
    outputs, inputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    transposed = draw(st.booleans())
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    support = st.lists(st.integers(0, outputs * inputs - 1), min_size=1, max_size=outputs * inputs)
    deltas = [make_delta(shape, positions) for positions in draw(st.lists(support, min_size=1, max_size=3))]
    x = torch.randn(*draw(st.sampled_from([(3,), (2, 4), (1, 1, 2)])), inputs, dtype=torch.float64)
    return x, torch.randn(shape, dtype=torch.float64), deltas, transposed


@given(linear_problems())
def test_sparse_linear_equals_the_dense_product(problem: tuple[Tensor, Tensor, list[SparseDelta], bool]) -> None:
    x, weight, deltas, transposed = problem
    dense = weight + sum(dense_delta(delta) for delta in deltas)
    bias = torch.randn(weight.shape[1 if transposed else 0], dtype=torch.float64)
    expected = F.linear(x, dense.t() if transposed else dense, bias)
    torch.testing.assert_close(sparse_linear(x, weight, bias, deltas, transposed), expected)


@given(linear_problems())
def test_sparse_linear_has_the_gradients_of_the_dense_product(
    problem: tuple[Tensor, Tensor, list[SparseDelta], bool],
) -> None:
    x, weight, deltas, transposed = problem
    bias = torch.randn(weight.shape[1 if transposed else 0], dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    dense = (weight + sum(dense_delta(delta) for delta in deltas)).requires_grad_()
    direction = torch.randn(*x.shape[:-1], len(bias), dtype=torch.float64)
    expected = torch.autograd.grad(
        (F.linear(x, dense.t() if transposed else dense, bias) * direction).sum(), (x, bias, dense)
    )
    values = [delta.values for delta in deltas]
    got = torch.autograd.grad(
        (sparse_linear(x, weight, bias, deltas, transposed) * direction).sum(), (x, bias, *values)
    )
    torch.testing.assert_close(got[:2], expected[:2])
    for delta, grad in zip(deltas, got[2:], strict=True):
        torch.testing.assert_close(grad, expected[2].flatten()[delta.indices])


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_linear_passes_gradcheck(transposed: bool) -> None:
    delta = make_delta((4, 5), [0, 3, 7, 8, 19])
    weight = torch.randn(4, 5, dtype=torch.float64)
    outputs, inputs = (5, 4) if transposed else (4, 5)
    x = torch.randn(3, inputs, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        moved = SparseDelta(delta.shape, delta.indices, torch.zeros(0))
        del moved.values
        moved.values = values
        return sparse_linear(x, weight, bias, [moved], transposed)

    assert torch.autograd.gradcheck(product, (x, bias, delta.values.detach().requires_grad_()))


@given(linear_problems())
def test_the_product_and_its_adjoint_agree(problem: tuple[Tensor, Tensor, list[SparseDelta], bool]) -> None:
    x, weight, deltas, transposed = problem
    x.requires_grad_()
    y = sparse_linear(x, weight, None, deltas, transposed)
    other = torch.randn_like(y)
    (adjoint,) = torch.autograd.grad(y, x, other)
    torch.testing.assert_close((y * other).sum(), (x * adjoint).sum())


def test_only_the_touched_columns_of_the_input_are_saved() -> None:
    delta = make_delta((16, 64), [3, 64 * 5 + 3, 64 * 7 + 9])
    saved: list[Tensor] = []
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        weight = torch.randn(16, 64, dtype=torch.float64)
        sparse_linear(x, weight, None, [delta], False)
    activations = [t for t in saved if t.is_floating_point() and t.shape != weight.shape and t is not delta.values]
    blocks = plan_linear(delta, transposed=False).area
    assert sum(t.numel() for t in activations) <= 10 * 2 + len(delta.values) + blocks < x.numel()


@given(linear_problems())
def test_the_blocks_of_a_plan_hold_every_entry_once_at_its_place(
    problem: tuple[Tensor, Tensor, list[SparseDelta], bool],
) -> None:
    _, weight, deltas, transposed = problem
    for delta in deltas:
        plan = plan_linear(delta, transposed)
        rebuilt = torch.zeros_like(weight.t() if transposed else weight)
        columns = torch.arange(rebuilt.shape[1]) if plan.columns is None else plan.columns
        assert plan.width == len(columns) == len(set(columns.tolist()))
        for block in plan.blocks:
            rows = torch.arange(len(rebuilt)) if block.rows is None else block.rows
            assert len(rows) == block.height
            place = rows[:, None], columns[block.start : block.stop]
            assert not bool(rebuilt[place].any())
            rebuilt[place] = ops._dense(block, delta.values.detach(), weight.dtype)
        assert torch.equal(rebuilt.t() if transposed else rebuilt, dense_delta(delta))
        assert plan.area <= rebuilt.numel()


def test_a_dense_column_and_scattered_entries_make_two_small_blocks() -> None:
    rows, columns = 512, 400
    positions = [row * columns + 7 for row in range(rows)] + [row * columns + row * 3 for row in range(60)]
    plan = plan_linear(make_delta((rows, columns), positions), transposed=False)
    assert plan.columns is not None
    assert plan.columns[0] == 7
    assert [block.height for block in plan.blocks] == [512, 60]
    assert plan.area < 512 + 60 * 61
    assert str(plan) == f"Plan(512 x 1 + 60 x {plan.width - 1})"


def test_the_plan_follows_the_support_when_it_changes_in_place() -> None:
    delta = make_delta((16, 64), [3, 64 * 5 + 3])
    assert plan_linear(delta, transposed=False).blocks[0].rows.tolist() == [0, 5]
    with torch.no_grad():
        delta.indices.copy_(torch.tensor([64, 64 * 2]))
    assert plan_linear(delta, transposed=False).blocks[0].rows.tolist() == [1, 2]


@pytest.mark.parametrize("composed", [True, False])
@given(problem=linear_problems())
def test_both_forms_agree_with_the_dense_product(
    composed: bool, problem: tuple[Tensor, Tensor, list[SparseDelta], bool]
) -> None:
    x, weight, deltas, transposed = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "composes", lambda *_: composed)
        test_sparse_linear_equals_the_dense_product.hypothesis.inner_test((x, weight, deltas, transposed))
        test_sparse_linear_has_the_gradients_of_the_dense_product.hypothesis.inner_test((x, weight, deltas, transposed))


def test_few_tokens_add_and_many_tokens_compose() -> None:
    weight = torch.zeros(256, 256)
    delta = make_delta((256, 256), [row * 256 + 3 for row in range(40)])
    plans = [plan_linear(delta, transposed=False)]
    assert not composes(1, weight, plans)
    assert composes(100_000, weight, plans)
    scattered = make_delta((256, 256), torch.randperm(256 * 256)[:2000].tolist())
    assert composes(1, weight, [plan_linear(scattered, transposed=False)])


def test_a_support_out_of_range_never_reaches_a_product() -> None:
    delta = SparseDelta(torch.Size((2, 2)), torch.tensor([1, 4]), torch.randn(2))
    with pytest.raises(ValueError, match="position 4"):
        compose(torch.zeros(2, 2), [delta])
    with pytest.raises(ValueError, match="position 4"):
        sparse_linear(torch.zeros(1, 2), torch.zeros(2, 2), None, [delta], False)


def test_the_half_precision_sum_is_rounded_once() -> None:
    parameter = torch.randn(4, 4).to(torch.bfloat16)
    delta = make_delta((4, 4), [1, 6, 11], torch.float32)
    expected = (parameter.float() + dense_delta(delta)).to(torch.bfloat16)
    assert torch.equal(compose(parameter, [delta]), expected)
