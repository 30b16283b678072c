"""Laws of the products with W + Δ."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from peft_sam.sparse import ops, plan, products
from peft_sam.sparse.costs import CPU, CUDA
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.ops import compose, sparse_linear
from peft_sam.sparse.plan import Plan, make_plan, plan_linear, way_to_multiply
from tests.shared.reference import dense_delta

pytestmark = pytest.mark.on_device


def make_delta(shape: tuple[int, int], positions: list[int], dtype: torch.dtype = torch.float64) -> SparseDelta:
    indices = torch.tensor(sorted(set(positions)), dtype=torch.int64)
    return SparseDelta(torch.Size(shape), indices, torch.randn(len(indices), dtype=dtype))


def in_form(delta: SparseDelta, transposed: bool, form: str) -> Plan:
    """The plan of `delta` when one form costs nothing and the others all there is."""
    priced = {
        "submatrix": CPU._replace(gather=0, sampled=10**9),
        "sampled": CPU._replace(gather=0, sampled=0),
        "chunked": CPU._replace(gather=10**9),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "costs_of", lambda _: priced[form])
        made = make_plan(delta, transposed)
    # a support of the whole matrix costs the same in all forms, and has no blocks where the workspace does not hold it
    if made.form != form and form != "submatrix":
        rows = torch.arange(delta.shape[0] + 1)
        starts = torch.searchsorted(delta.indices // delta.shape[1], rows).int()
        made = made._replace(form=form, columns=None, blocks=(), order=None, starts=starts)
    return made


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
    torch.testing.assert_close(sparse_linear(x, weight, bias, deltas, (), transposed), expected)


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
        (sparse_linear(x, weight, bias, deltas, (), transposed) * direction).sum(), (x, bias, *values)
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
        return sparse_linear(x, weight, bias, [moved], (), transposed)

    assert torch.autograd.gradcheck(product, (x, bias, delta.values.detach().requires_grad_()))


@given(linear_problems())
def test_the_product_and_its_adjoint_agree(problem: tuple[Tensor, Tensor, list[SparseDelta], bool]) -> None:
    x, weight, deltas, transposed = problem
    x.requires_grad_()
    y = sparse_linear(x, weight, None, deltas, (), transposed)
    other = torch.randn_like(y)
    (adjoint,) = torch.autograd.grad(y, x, other)
    torch.testing.assert_close((y * other).sum(), (x * adjoint).sum())


@pytest.mark.on_device(False)  # its costs choose the plan
def test_only_the_touched_columns_of_the_input_are_saved() -> None:
    delta = make_delta((16, 64), [3, 64 * 5 + 3, 64 * 7 + 9])
    saved: list[Tensor] = []
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        weight = torch.randn(16, 64, dtype=torch.float64)
        sparse_linear(x, weight, None, [delta], (), False)
    activations = [t for t in saved if t.is_floating_point() and t.shape != weight.shape and t is not delta.values]
    assert sum(t.numel() for t in activations) == 10 * 2 < x.numel()


@given(linear_problems())
def test_the_blocks_of_a_plan_hold_every_entry_once_at_its_place(
    problem: tuple[Tensor, Tensor, list[SparseDelta], bool],
) -> None:
    _, weight, deltas, transposed = problem
    for delta in deltas:
        found = in_form(delta, transposed, "submatrix")
        rebuilt = torch.zeros_like(weight.t() if transposed else weight)
        columns = torch.arange(rebuilt.shape[1]) if found.columns is None else found.columns
        assert found.blocks[-1].stop == len(columns) == len(set(columns.tolist()))
        for block in found.blocks:
            rows = torch.arange(len(rebuilt)) if block.rows is None else block.rows
            assert len(rows) == block.height
            place = rows[:, None], columns[block.start : block.stop]
            assert not bool(rebuilt[place].any())
            rebuilt[place] = products.dense_block(block, delta.values.detach(), weight.dtype)
        assert torch.equal(rebuilt.t() if transposed else rebuilt, dense_delta(delta))
        assert found.area <= rebuilt.numel()


@pytest.mark.on_device(False)  # its costs choose the plan
def test_a_dense_column_and_scattered_entries_make_two_small_blocks() -> None:
    rows, columns = 512, 400
    positions = [row * columns + 7 for row in range(rows)] + [row * columns + row * 3 for row in range(60)]
    found = plan_linear(make_delta((rows, columns), positions), transposed=False)
    assert found.columns is not None
    assert found.columns[0] == 7
    assert found.columns[1:].tolist() == sorted(found.columns[1:].tolist())
    assert [block.height for block in found.blocks] == [512, 60]
    assert found.area < 512 + 60 * 61
    assert str(found) == f"submatrix 512 x 1 + 60 x {len(found.columns) - 1}"


@pytest.mark.on_device(False)  # its costs choose the plan
def test_the_plan_follows_the_support_when_it_changes_in_place() -> None:
    delta = make_delta((16, 64), [3, 64 * 5 + 3])
    assert plan_linear(delta, transposed=False).blocks[0].rows.tolist() == [0, 5]
    delta.hold(torch.tensor([64, 64 * 2]))
    assert plan_linear(delta, transposed=False).blocks[0].rows.tolist() == [1, 2]


@pytest.mark.parametrize("workspace", [1, 7, plan.WORKSPACE])
@pytest.mark.parametrize("way", ["compose", "entries", "blocks"])
@pytest.mark.parametrize("form", list(products.GRADIENTS))
@given(problem=linear_problems())
def test_every_form_agrees_with_the_dense_product(
    form: str, way: str, workspace: int, problem: tuple[Tensor, Tensor, list[SparseDelta], bool]
) -> None:
    x, weight, deltas, transposed = problem
    if form == "sampled" and x.device.type != "cpu":
        pytest.skip("torch's sparse products are for the CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WORKSPACE", workspace)
        patch.setattr(ops, "way_to_multiply", lambda plans, *_: way if all(p.blocks for p in plans) else "compose")
        patch.setattr(ops, "plan_linear", lambda delta, transposed: in_form(delta, transposed, form))
        test_sparse_linear_equals_the_dense_product.hypothesis.inner_test((x, weight, deltas, transposed))
        test_sparse_linear_has_the_gradients_of_the_dense_product.hypothesis.inner_test((x, weight, deltas, transposed))
        test_a_product_without_a_weight_is_that_of_the_deltas.hypothesis.inner_test((x, weight, deltas, transposed))


@pytest.mark.parametrize("workspace", [7, plan.WORKSPACE])
@given(problem=linear_problems())
def test_autocast_multiplies_with_the_sum_as_it_is_merged_rounded_once_more(
    workspace: int, problem: tuple[Tensor, Tensor, list[SparseDelta], bool]
) -> None:
    x, weight, of, transposed = problem
    x, weight = x.float(), weight.float()
    deltas = [SparseDelta(delta.shape, delta.indices, delta.values.detach().float()) for delta in of]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WORKSPACE", workspace)
        composed = ops._composed(
            weight,
            [make_plan(delta, transposed) for delta in deltas],
            [delta.indices for delta in deltas],
            [delta.values for delta in deltas],
            torch.bfloat16,
        )
        found = torch.cat([part.clone() for _, part in composed])
    assert torch.equal(found, compose(weight, deltas).to(torch.bfloat16))


@given(linear_problems())
def test_a_product_without_a_weight_is_that_of_the_deltas(
    problem: tuple[Tensor, Tensor, list[SparseDelta], bool],
) -> None:
    x, weight, deltas, transposed = problem
    values, zeros = [delta.values for delta in deltas], torch.zeros_like(weight)
    direction = torch.randn(*x.shape[:-1], weight.shape[1 if transposed else 0], dtype=x.dtype)
    x = x.detach().requires_grad_()
    y, expected = (sparse_linear(x, w, None, deltas, (), transposed) for w in (None, zeros))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, *values), direction), torch.autograd.grad(expected, (x, *values), direction)
    )


@pytest.mark.on_device(False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_sampled_of_half_precision_is_summed_in_single(dtype: torch.dtype, transposed: bool) -> None:
    delta = make_delta((6, 5), [0, 7, 8, 29], torch.float32)
    rows, columns = torch.randn(300, 6).to(dtype), torch.randn(300, 5).to(dtype)
    x, grad = (rows, columns) if transposed else (columns, rows)
    found = products.value_gradient(in_form(delta, transposed, "sampled"), x, grad, torch.float32)
    expected = (rows.double().t() @ columns.double()).flatten()[delta.indices]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.on_device(False)
def test_a_clustered_support_is_multiplied_in_blocks_and_a_scattered_one_is_sampled() -> None:
    clustered = make_delta((256, 256), [row * 256 + 3 for row in range(40)])
    scattered = make_delta((256, 256), torch.randperm(256 * 256)[:300].tolist())
    crowded = make_delta((256, 256), list(range(256 * 256)))
    forms = [plan_linear(delta, transposed=False).form for delta in (clustered, scattered, crowded)]
    assert forms == ["submatrix", "sampled", "submatrix"]
    assert len(plan_linear(crowded, transposed=False).blocks) == 1


@pytest.mark.on_device(False)
def test_the_way_to_multiply_follows_what_can_be_read_and_how_many_tokens_there_are() -> None:
    clustered = [plan_linear(make_delta((256, 256), [row * 256 + 3 for row in range(40)]), transposed=False)]
    scattered = [plan_linear(make_delta((256, 256), torch.randperm(256 * 256)[:2000].tolist()), transposed=False)]
    assert way_to_multiply(clustered, 1, torch.zeros(64, 64)) == "compose"
    assert [way_to_multiply(clustered, tokens, torch.zeros(512, 512)) for tokens in (1, 5)] == ["entries", "compose"]
    assert [way_to_multiply(clustered, tokens, None) for tokens in (1, 10_000)] == ["blocks", "blocks"]
    assert [way_to_multiply(scattered, tokens, None) for tokens in (1, 10_000)] == ["entries", "compose"]
    there = [[made._replace(costs=CUDA) for made in plans] for plans in (clustered, scattered)]
    ways = [[way_to_multiply(plans, tokens, torch.zeros(256, 256)) for tokens in (1, 20, 10_000)] for plans in there]
    assert ways == [["blocks", "blocks", "compose"], ["entries", "compose", "compose"]]


def test_no_dense_copy_is_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WORKSPACE", 64)
    chunks = make_plan(make_delta((50, 20), [0, 59, 60, 999]), transposed=False).chunks
    assert [(c.stop - c.start) * 20 for c in chunks] == [60] * 16 + [40]
    assert [(c.low, c.high) for c in chunks if c.low < c.high] == [(0, 2), (2, 3), (3, 4)]
    assert len(make_plan(make_delta((3, 100), [5]), transposed=False).chunks) == 3


@pytest.mark.parametrize("shape", [(2**18, 2**16), (2**16, 2**18)])
def test_places_in_a_weight_of_more_than_2_31_entries_are_found_again(shape: tuple[int, int]) -> None:
    number = torch.arange(2**17)
    rows, columns = number * 2 % shape[0], number * 7 % (shape[1] // 2) * 2
    positions = torch.unique(rows * shape[1] + columns)
    found = in_form(SparseDelta(torch.Size(shape), positions, torch.zeros(len(positions))), False, "submatrix")
    assert int(torch.unique(rows).numel()) * int(torch.unique(columns).numel()) > 2**31
    assert all(block.height * (block.stop - block.start) <= plan.WORKSPACE for block in found.blocks)
    again = []
    for block in found.blocks:
        width, local = block.stop - block.start, block.local.long()
        row, column = (local % block.height, local // block.height) if block.tall else (local // width, local % width)
        row = row if block.rows is None else block.rows[row].long()
        again.append(row * shape[1] + found.columns[block.start :][column].long())
    order = slice(None) if found.order is None else found.order.long()
    assert torch.equal(torch.cat(again)[order], positions)


def test_nothing_dense_is_kept_for_backward_of_a_scattered_support() -> None:
    weight, x = torch.randn(64, 64), torch.randn(10, 64, requires_grad=True)
    delta = make_delta((64, 64), torch.randperm(64 * 64)[:200].tolist(), torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        sparse_linear(x, weight, None, [delta], (), False)
    known = {t.untyped_storage().data_ptr() for t in (weight, x, delta.values)}
    assert {t.untyped_storage().data_ptr() for t in saved} == known


def test_a_support_out_of_range_never_reaches_a_product() -> None:
    delta = SparseDelta(torch.Size((2, 2)), torch.tensor([1, 4]), torch.randn(2))
    with pytest.raises(ValueError, match="position 4"):
        compose(torch.zeros(2, 2), [delta])
    with pytest.raises(ValueError, match="position 4"):
        sparse_linear(torch.zeros(1, 2), torch.zeros(2, 2), None, [delta], (), False)


def test_the_half_precision_sum_is_rounded_once() -> None:
    parameter = torch.randn(4, 4).to(torch.bfloat16)
    delta = make_delta((4, 4), [1, 6, 11], torch.float32)
    expected = (parameter.float() + dense_delta(delta)).to(torch.bfloat16)
    assert torch.equal(compose(parameter, [delta]), expected)


@pytest.mark.parametrize("chunked", [False, True])
def test_autocast_around_the_backward_pass_alone_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    if chunked:
        monkeypatch.setattr(plan, "WORKSPACE", 16)
    delta, weight = make_delta((6, 5), [1, 7, 13, 22, 28], torch.float32), torch.randn(6, 5)
    x = torch.randn(9, 5, requires_grad=True)
    y = sparse_linear(x, weight, None, [delta], [], transposed=False)
    expected = torch.autograd.grad(y.sum(), (x, delta.values), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, (x, delta.values), torch.ones_like(y))
    assert all(torch.equal(here, there) for here, there in zip(found, expected, strict=True))


def test_a_pass_that_only_computes_shapes_leaves_nothing_to_the_next() -> None:
    delta, weight = make_delta((40, 40), list(range(0, 1600, 7)), torch.float32), torch.randn(40, 40)
    x = torch.randn(300, 40)
    plan_linear(delta, transposed=False)
    found: list[Tensor] = []

    def run() -> None:  # a thread has no memory from before
        with FakeTensorMode(allow_non_fake_inputs=True):
            sparse_linear(torch.ones(300, 40), weight, None, [delta], [], transposed=False)
        found.append(sparse_linear(x, weight, None, [delta], [], transposed=False).detach())

    thread = Thread(target=run)
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], x @ (weight + dense_delta(delta)).t())
