"""Laws of the code in which files hold supports."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_sam.sparse.coding import code_length, decode, encode


@st.composite
def supports(draw: st.DrawFn) -> tuple[Tensor, int]:
    numel = draw(st.one_of(st.integers(1, 300), st.integers(1, 2**28)))
    positions = draw(st.sets(st.integers(0, numel - 1), min_size=1, max_size=40))
    return torch.tensor(sorted(positions)), numel


@given(supports(), st.sampled_from([torch.int64, torch.int32]))
def test_a_support_comes_back_from_its_code(support: tuple[Tensor, int], dtype: torch.dtype) -> None:
    indices, numel = support
    code = encode(indices.to(dtype), numel)
    assert code.dtype == torch.uint8
    assert len(code) == code_length(len(indices), numel)
    assert torch.equal(decode(code, len(indices), numel, "w"), indices)


@pytest.mark.parametrize(
    ("positions", "numel"),
    [
        ([0], 1),
        ([0, 1, 2, 3], 4),
        ([255, 256, 257], 258),
        ([0, 2**33 + 5, 2**40 - 1], 2**40),
        ([2**62], 2**62 + 1),
        ([0, 65535, 65536], 2**24),
    ],
)
def test_large_and_full_parameters_have_codes(positions: list[int], numel: int) -> None:
    indices = torch.tensor(positions)
    assert torch.equal(decode(encode(indices, numel), len(indices), numel, "w"), indices)


@pytest.mark.parametrize("density", [0.0005, 0.005, 0.02, 0.1, 0.5])
def test_the_code_is_within_a_bit_and_a_half_of_the_information_of_a_random_support(density: float) -> None:
    numel = 10**7
    bits = 8 * code_length(round(density * numel), numel) / numel
    information = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert information < bits < information + 1.5 * density


@given(st.binary(max_size=12), st.integers(1, 6), st.integers(1, 2000))
def test_any_bytes_are_a_support_or_an_error(code: bytes, entries: int, numel: int) -> None:
    given_code = torch.frombuffer(bytearray(code), dtype=torch.uint8) if code else torch.empty(0, dtype=torch.uint8)
    try:
        found = decode(given_code, entries, numel, "w")
    except ValueError as error:
        assert "coded support of 'w'" in str(error)  # noqa: PT017
        return
    assert len(found) == entries
    high = found >> 8
    assert bool((high[1:] >= high[:-1]).all())
