"""Low-rank changes of linear layers' weights beside the sparse ones (RoSA, Nikdan et al. 2024, arXiv 2401.04679)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_sam.sparse.at_hand import AtHand
from peft_sam.sparse.delta import SparseDelta
from peft_sam.sparse.ops import compose, product_dtype

# Standard deviation of B where init_weights=False wants a change that is not zero.
TEST_INIT_STD = 0.02


class LowRank(AtHand):
    """α/r · B·A, added to the weight of a linear layer (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        lora_A, lora_B: (r × inputs) and (outputs × r), trained; B starts at zero.
        alpha: α.
        dropout: of the inputs, while it is trained.
        transposed: whether the weight is stored as (inputs × outputs).
        seed, zero: of how it starts (`reset`).

    Args:
        shape: of the weight.
    """

    def __init__(
        self,
        shape: torch.Size,
        transposed: bool,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int = 0,
        zero: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        outputs, inputs = reversed(shape) if transposed else shape
        self.lora_A = nn.Parameter(torch.empty(r, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(outputs, r, dtype=dtype, device=device))
        self.alpha, self.dropout, self.transposed = float(alpha), dropout, transposed
        self.seed, self.zero = seed, zero
        self.reset()

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.lora_A)

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        outputs, inputs = len(self.lora_B), self.lora_A.shape[1]
        return torch.Size((inputs, outputs) if self.transposed else (outputs, inputs))

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.r

    @torch.no_grad()
    def reset(self) -> None:
        """A as PEFT's LoRA starts it, but the same in all processes; B zero, or small random numbers."""
        if self.lora_A.is_meta:
            return
        generator = torch.Generator().manual_seed(self.seed)
        # kaiming_uniform_ with a = √5
        bound = 1 / math.sqrt(max(self.lora_A.shape[1], 1))
        a, b = (torch.zeros(own.shape, dtype=torch.float32, device="cpu") for own in (self.lora_A, self.lora_B))
        self.lora_A.copy_(a.uniform_(-bound, bound, generator=generator))
        self.lora_B.copy_(b if self.zero else b.normal_(std=TEST_INIT_STD, generator=generator))

    def forward(self, y: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
        """y + scale · α/r · (x Aᵀ) Bᵀ, for a layer's output y, of its dtype, and inputs x of shape (..., inputs).

        Factors lie so that no product, here or in the backward pass, has a thin matrix on its right, which takes CPU
        libraries up to five times as long.
        """
        x = F.dropout(x.to(product_dtype(x, self.lora_A.dtype)), self.dropout, self.training)
        tokens = math.prod(x.shape[:-1])
        inner = (self.lora_A @ x.reshape(tokens, x.shape[-1]).t()).t()
        outer, scale = self.lora_B.t().contiguous(), scale * self.scaling
        if y.dtype == inner.dtype and y.device == inner.device:
            return torch.addmm(y.reshape(tokens, y.shape[-1]), inner, outer, alpha=scale).view(y.shape)
        return y + (inner @ outer * scale).to(y.device, y.dtype).view(y.shape)

    def dense(self) -> Tensor:
        """α/r · B·A in the shape of the weight, in float32 or better, also under autocast; differentiable."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            found = self.lora_B.to(dtype) @ self.lora_A.to(dtype) * self.scaling
        return found.t() if self.transposed else found

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"r={self.r}, alpha={self.alpha:g}" + (f", dropout={self.dropout:g}" if self.dropout else "")


class Pair(NamedTuple):
    """A low-rank change at an adapter's scale."""

    low_rank: LowRank
    scale: float

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        return self.low_rank.shape

    def added_to_output(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output y for inputs x with it."""
        found: Tensor = self.low_rank(y, x, self.scale)
        return found

    def dense(self) -> Tensor:
        """The change, in the shape of the weight; differentiable."""
        return self.low_rank.dense() * self.scale

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with it, in the weight's dtype; the sum is in that of the change."""
        change = self.dense()
        return (weight.to(change.dtype) + change.to(weight.device)).to(weight.dtype)


# parameter name → what changes it, in order
Changes = Mapping[str, Sequence[SparseDelta | Pair]]


def composed_with(parameter: Tensor, changes: Sequence[SparseDelta | Pair]) -> Tensor:
    """θ + Δ₁ + Δ₂ + …, each sum rounded to θ's dtype in turn (`compose`), where some of the changes are low-rank."""
    sparse: list[SparseDelta] = []
    for change in changes:
        if isinstance(change, Pair):
            parameter, sparse = change.added_to(compose(parameter, sparse)), []
        else:
            sparse.append(change)
    return compose(parameter, sparse)
