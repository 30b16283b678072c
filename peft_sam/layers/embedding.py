"""Embeddings: only the rows that a batch looks up are changed, and only they get a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peft_sam.layers.base import SamLayer
from peft_sam.layers.owned import is_bare, is_plain
from peft_sam.layers.substitute import is_written_down
from peft_sam.sparse.delta import SparseDelta


class Rows(NamedTuple):
    """The entries of a Δ by rows.

    starts: where the entries of each row start, and their number last.
    column: of each entry.
    steps: 0, 1, … up to the number of entries that the fullest row has, at least two of them.
    """

    starts: Tensor
    column: Tensor
    steps: Tensor

    def entries(self, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        """For each id the numbers of its row's entries, (ids × steps), and which of them there are."""
        first, stop = self.starts[ids, None], self.starts[ids + 1, None]
        entry = first + self.steps
        inside = entry < stop
        if padding is not None:
            inside = inside & (ids != padding)[:, None]
        return entry.clamp(max=len(self.column) - 1), inside


def rows_of(delta: SparseDelta) -> Rows:
    """The entries of `delta`, a change of a (vocabulary × width) matrix, by rows; made once per support."""

    rows: Rows = delta.derive("rows", _make_rows)
    return rows


def _make_rows(delta: SparseDelta) -> Rows:
    indices, (height, width) = delta.checked_indices(), delta.shape
    starts = torch.searchsorted(indices // width, torch.arange(height + 1, device=indices.device))
    steps = torch.arange(max(2, int(starts.diff().max())), device=indices.device)
    torch._dynamo.maybe_mark_dynamic(steps, 0)  # another support of the same size is no reason to compile again
    return Rows(starts, indices % width, steps)


def sparse_embedding(ids: Tensor, weight: Tensor, deltas: Sequence[SparseDelta], padding: int | None) -> Tensor:
    """Rows `ids` of W + Σ Δ for a frozen W of shape (vocabulary, width): (..., width) for ids of shape (...).

    The sums have the bits that merging gives. Gradient of each Δ's values: the sum over the places that look the
    entry's row up; none through the row `padding`, as in torch.nn.functional.embedding.
    """
    rows = tuple(rows_of(delta) for delta in deltas)
    y: Tensor = _SparseEmbedding.apply(ids.flatten(), weight, padding, rows, *(delta.values for delta in deltas))
    return y.view(*ids.shape, weight.shape[1])


class _SparseEmbedding(torch.autograd.Function):
    """`sparse_embedding` for 1-D ids."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, rows: tuple[Rows, ...], *values: Tensor
    ) -> Tensor:
        ctx.padding, ctx.rows, ctx.dtypes = padding, rows, [value.dtype for value in values]
        ctx.save_for_backward(ids)
        y = F.embedding(ids, weight)
        for of, value in zip(rows, values, strict=True):
            entry, inside = of.entries(ids, None)
            added = value[entry].masked_fill_(~inside, 0)
            y = y.to(value.dtype).scatter_add_(1, of.column[entry], added).to(weight.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grads = []
        for of, dtype in zip(ctx.rows, ctx.dtypes, strict=True):
            entry, inside = of.entries(ids, ctx.padding)
            found = grad.gather(1, of.column[entry]).to(dtype).masked_fill_(~inside, 0)
            grads.append(found.new_zeros(len(of.column)).index_add_(0, entry.flatten(), found.flatten()))
        return (None, None, None, None, *grads)


class Scaled(nn.Embedding):
    """An embedding times a number, as in BART."""

    embed_scale: float

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows of the table, times `embed_scale`."""
        return super().forward(input_ids) * self.embed_scale


class ScaledInDtype(nn.Embedding):
    """An embedding times a number that is kept as a buffer, as in Gemma."""

    embed_scale: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows of the table, times `embed_scale` rounded to its dtype."""
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


def is_scaled(module: nn.Module) -> bool:
    """Whether a module's forward is, instruction for instruction, one of these two; each model has its own class."""
    code, scale = getattr(type(module).forward, "__code__", None), getattr(module, "embed_scale", None)
    alike = (ScaledInDtype if isinstance(scale, Tensor) else Scaled).forward.__code__
    same = code is not None and (code.co_code, code.co_names) == (alike.co_code, alike.co_names)
    return isinstance(module, nn.Embedding) and same


class SamEmbedding(SamLayer):
    """`nn.Embedding`, scaled or not, by `sparse_embedding` where the table is plain, frozen and nobody watches it."""

    def _forward_with(self, changes: Any, *args: Any, **kwargs: Any) -> Any:
        base: Any = self.base_layer
        special = base.max_norm is not None or base.scale_grad_by_freq
        special = special or is_written_down()
        if len(args) != 1 or kwargs or special or not is_plain(base.weight) or not is_bare(base):
            return super()._forward_with(changes, *args, **kwargs)
        y = sparse_embedding(args[0], base.weight, changes["weight"], base.padding_idx)
        scale = getattr(base, "embed_scale", None)
        return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def _prepare(self, name: str, delta: SparseDelta) -> None:
        super()._prepare(name, delta)
        rows_of(delta)


class TiedEmbedding(SamEmbedding, nn.Embedding):  # type: ignore[override]
    """The layer of an embedding that is no target, only tied to one.

    Whoever looks for an nn.Embedding finds one there: nobody asked for another module. What it does is the layer's.
    """

    extra_repr = SamEmbedding.extra_repr
