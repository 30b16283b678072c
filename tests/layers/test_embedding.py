"""Laws of the fast embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from peft_sam.layers.base import SamLayer
from peft_sam.layers.embedding import SamEmbedding, rows_of, sparse_embedding
from peft_sam.layers.make import make_layer
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.ops import compose
from tests.shared.reference import dense_delta

pytestmark = pytest.mark.on_device


@st.composite
def tables(draw: Any) -> tuple[Tensor, list[SparseDelta], Tensor, int | None]:
    """A table, one to three deltas, ids of any shape, and perhaps a padding row."""
    rows, width = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    support = st.sets(st.integers(0, rows * width - 1), min_size=1)
    deltas = [
        SparseDelta(
            torch.Size((rows, width)),
            torch.tensor(sorted(positions)),
            torch.randn(len(positions), dtype=torch.float64),
        )
        for positions in draw(st.lists(support, min_size=1, max_size=3))
    ]
    ids = torch.randint(0, rows, draw(st.sampled_from([(), (0,), (4,), (2, 3)])))
    padding = draw(st.none() | st.integers(0, rows - 1))
    return torch.randn(rows, width, dtype=torch.float64), deltas, ids, padding


@given(tables())
def test_it_looks_up_the_rows_of_the_dense_sum_with_its_gradients(
    problem: tuple[Tensor, list[SparseDelta], Tensor, int | None],
) -> None:
    weight, deltas, ids, padding = problem
    dense = (weight + sum(dense_delta(delta) for delta in deltas)).requires_grad_()
    y, expected = sparse_embedding(ids, weight, deltas, padding), F.embedding(ids, dense, padding)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(expected)
    got = torch.autograd.grad(y, [delta.values for delta in deltas], direction)
    (dense_grad,) = torch.autograd.grad(expected, dense, direction)
    for delta, grad in zip(deltas, got, strict=True):
        torch.testing.assert_close(grad, dense_grad.flatten()[delta.indices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_have_the_bits_of_the_composed_table(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 6).to(dtype)
    deltas = [
        SparseDelta(weight.shape, torch.randperm(120)[:30].sort().values, torch.randn(30) / 100) for _ in range(2)
    ]
    ids = torch.randint(0, 20, (50,))
    assert torch.equal(sparse_embedding(ids, weight, deltas, None), F.embedding(ids, compose(weight, deltas)))


def test_neither_pass_makes_anything_of_the_table_s_size() -> None:
    weight = torch.randn(5000, 16)
    delta = SparseDelta(weight.shape, torch.randperm(weight.numel())[:400].sort().values, torch.randn(400))
    ids = torch.randint(0, 5000, (3, 4))
    rows_of(delta)
    with torch.profiler.profile(profile_memory=True) as profile:
        sparse_embedding(ids, weight, [delta], None).sum().backward()
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest < weight.numel() * 4 / 20


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=lambda o: next(iter(o))
)
def test_special_tables_take_the_general_way(options: dict[str, Any]) -> None:
    layer = make_layer(nn.Embedding(9, 4, **options), None)
    assert type(layer) is SamEmbedding
    layer.update_layer("default", ["weight"])
    layer.set_adapter("default")
    layer.set_support("default", {"weight": torch.tensor([1, 6, 20])}, {"weight": torch.tensor([1.0, 2.0, 3.0])})
    table, ids = layer.base_layer.weight.detach().clone(), torch.tensor([0, 1, 5])
    expected = F.embedding(
        ids, compose(table, list(layer.deltas("default").values())), max_norm=options.get("max_norm")
    )
    torch.testing.assert_close(layer(ids), expected)


@pytest.mark.parametrize("cls", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_an_embedding_times_a_number_is_looked_up_in_the_same_way(cls: Any) -> None:
    layer = make_layer(cls(9, 4, 0, 2.5).bfloat16(), None)
    assert type(layer) is SamEmbedding
    layer.update_layer("default", ["weight"])
    layer.set_adapter("default")
    layer.set_support("default", {"weight": torch.tensor([1, 6, 20])}, {"weight": torch.tensor([1.0, 2.0, 3.0])})
    ids, found = torch.tensor([0, 1, 5]), layer(torch.tensor([0, 1, 5]))
    layer.merge()
    assert torch.equal(found, layer.base_layer(ids))


def test_another_forward_is_left_to_the_general_layer() -> None:
    class Tripled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 3

    class Shifted(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + self.embed_scale

    assert type(make_layer(Tripled(4, 2), None)) is type(make_layer(Shifted(4, 2), None)) is SamLayer
