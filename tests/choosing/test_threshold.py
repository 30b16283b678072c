"""Laws of finding the k largest scores."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sam.choosing.threshold import bits_of, budget_of, kth_largest, largest
from tests.shared import reference

pytestmark = pytest.mark.on_device

# few distinct values, so that ties are common, and all kinds of floats
scores = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0]),
    st.floats(0, 2.0**127, width=32),
    st.sampled_from([1e-45, 1e-38, 3.4e38]),
)
tensors = st.lists(st.lists(scores, max_size=12), min_size=1, max_size=5).filter(lambda lists: any(lists))


def chunks_of(values: list[float], size: int = 5) -> object:
    bits = bits_of(torch.tensor(values, dtype=torch.float32))
    return lambda: bits.split(size) if len(bits) else iter(())


@given(tensors, st.data())
def test_the_k_largest_are_those_that_sorting_finds(lists: list[list[float]], data: st.DataObject) -> None:
    total = sum(map(len, lists))
    k = data.draw(st.integers(1, total))
    found, threshold = largest({str(i): chunks_of(values) for i, values in enumerate(lists)}, k)
    expected = reference.largest({str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(lists)}, k)
    assert {name: positions.tolist() for name, positions in found.items()} == expected
    flat = torch.tensor(sorted((v for values in lists for v in values), reverse=True), dtype=torch.float32)
    assert threshold == float(flat[k - 1])


@given(st.lists(scores, min_size=2, max_size=30))
def test_selections_are_nested_in_k(values: list[float]) -> None:
    chosen = [set(largest({"": chunks_of(values)}, k)[0][""].tolist()) for k in range(1, len(values) + 1)]
    assert all(small < large for small, large in itertools.pairwise(chosen))


@given(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=30), st.integers(-20, 20))
def test_scaling_all_scores_by_a_power_of_two_changes_nothing(values: list[float], exponent: int) -> None:
    values = [v if v > 1e-30 else 0.0 for v in values]
    k = (len(values) + 1) // 2
    one, _ = largest({"": chunks_of(values)}, k)
    other, _ = largest({"": chunks_of([v * 2.0**exponent for v in values])}, k)
    assert one[""].tolist() == other[""].tolist()


@given(st.lists(st.one_of(scores, st.just(float("nan"))), min_size=1, max_size=30), st.data())
def test_nan_is_never_among_the_largest_and_fewer_are_found_where_too_few_are_numbers(
    values: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(values)))
    found, threshold = largest({"": chunks_of(values)}, k)
    numbers = {i: v for i, v in enumerate(values) if v == v}
    expected = sorted(numbers, key=lambda i: (-numbers[i], i))[:k]
    assert found[""].tolist() == sorted(expected)
    lowest = min((numbers[i] for i in expected), default=float("inf"))
    assert threshold == float(torch.tensor(lowest, dtype=torch.float32))


def test_the_kth_largest_of_many_equals_topk() -> None:
    values = torch.rand(300_000) ** 4
    bits = bits_of(values)
    for k in (1, 2, 1500, 150_000, 300_000):
        found, above = kth_largest(lambda: bits.split(1 << 16), k)
        expected = values.topk(k).values[-1]
        assert torch.tensor(found, dtype=torch.int32).view(torch.float32) == expected
        assert above == int((values > expected).sum())


@pytest.mark.parametrize(
    ("density", "entries", "k"), [(0.29, 100, 29), (0.07, 100, 7), (0.005, 1000, 5), (1, 7, 7), (0.1, 9, 0)]
)
def test_the_budget_is_the_floor_of_the_density_as_written(density: float, entries: int, k: int) -> None:
    assert budget_of(density, entries) == k


@given(st.integers(1, 999), st.integers(0, 10**12))
def test_the_budget_is_exact_for_thousandths_at_any_size(thousandths: int, entries: int) -> None:
    assert budget_of(thousandths / 1000, entries) == int(Fraction(thousandths, 1000) * entries)
