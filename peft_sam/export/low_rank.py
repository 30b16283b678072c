"""The LoRA adapter that comes nearest to a SAM sparse adapter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from peft_sam.export.parts import Adapter, Part
from peft_sam.export.stock_sparse import StockAdapter
from peft_sam.layers.embedding import SamEmbedding
from peft_sam.layers.linear import SamLinear
from peft_sam.layers.owned import is_plain, stored_parameter
from peft_sam.sparse.delta import SparseDelta

# Up to so many active rows × active columns, singular vectors are exact (about two seconds on one core).
EXACT = 2**21
# Beyond, they are found by iteration. A random support has the flattest spectrum: of the norm that the best
# approximation holds, 1,500 × 1,500 at density 0.005, this many steps and spare vectors find 99.9 %.
STEPS, SPARE = 12, 32


# What the projections of experts were called before transformers fused them: PEFT takes targets that are called so for
# the fused ones in some mixtures of experts, and leaves out dense layers of the name. It goes by parameters, too.
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class Factors(NamedTuple):
    """Left (rows × r) and right (r × columns), whose product is near Δ, and ‖Δ - left right‖² and ‖Δ‖²."""

    left: Tensor
    right: Tensor
    missing: float
    whole: float


@torch.no_grad()
def approximate(delta: SparseDelta, rank: int) -> Factors:
    """The best approximation of a matrix Δ of rank at most `rank` in the Frobenius norm (Eckart and Young 1936).

    Only Δ's active rows and columns take part: with U their first left singular vectors it is U Uᵀ Δ.
    """
    values = delta.values.detach().double()
    if not len(values):
        return Factors(values.new_zeros(delta.shape[0], 0), values.new_zeros(0, delta.shape[1]), 0.0, 0.0)
    rows, row = (delta.indices // delta.shape[1]).unique(return_inverse=True)
    columns, column = (delta.indices % delta.shape[1]).unique(return_inverse=True)
    size = (len(rows), len(columns))
    block = torch.sparse_coo_tensor(torch.stack([row, column]), values, size, check_invariants=False).coalesce()
    vectors = _left_vectors(block, min(rank, *size))
    right = (block.t() @ vectors).t()
    # the singular values, shared out evenly
    scale = right.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    left_full = values.new_zeros(delta.shape[0], vectors.shape[1]).index_copy(0, rows, vectors * scale.t())
    right_full = values.new_zeros(vectors.shape[1], delta.shape[1]).index_copy(1, columns, right / scale)
    whole, held = float(values.square().sum()), float(right.square().sum())
    return Factors(left_full.float(), right_full.float(), max(whole - held, 0.0), whole)


def _left_vectors(block: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors, (rows × rank)."""
    if block.shape.numel() <= EXACT:
        vectors, _, _ = torch.linalg.svd(block.to_dense(), full_matrices=False)
        return vectors[:, :rank]
    with torch.random.fork_rng(devices=[block.device] if block.is_cuda else []):
        torch.manual_seed(0)
        vectors, _, _ = torch.svd_lowrank(block, min(2 * rank + SPARE, *block.shape), STEPS)
    return vectors[:, :rank]


def is_low_rank_target(part: Part) -> bool:
    """Whether stock LoRA can change this parameter: weight or bias of a linear layer, or an embedding.

    A weight may be quantised or offloaded: LoRA adds to the layer's output. Biases it adapts on plain weights only.
    """
    kinds = {"weight": (SamLinear, SamEmbedding), "bias": (SamLinear,)}
    if not isinstance(part.layer, kinds.get(part.parameter, ())) or part.layer.is_shared(part.parameter):
        return False
    return part.parameter == "weight" or is_plain(stored_parameter(part.layer.get_base_layer(), "weight"))


def lora(adapter: Adapter, rank: int) -> StockAdapter:
    """A LoRA adapter of the given rank, or of a smaller one that loses nothing, besides that of its low-rank pairs.

    Each Δ of a weight becomes `lora_B` @ `lora_A` with scaling 1; Δ of a bias the bias of `lora_B`, and a pair itself,
    exactly.

    Raises:
        ValueError: for biases next to embeddings, which LoRA does not adapt together.
    """
    weights = {part.module: part for part in adapter.parts if part.parameter == "weight"}
    biases = {part.module: part for part in adapter.parts if part.parameter == "bias"}
    embeddings = [part.name for part in weights.values() if isinstance(part.layer, SamEmbedding)]
    if biases and embeddings:
        raise ValueError(
            f"stock LoRA adapts either biases or embeddings; this adapter changes {len(biases)} biases, such as "
            f"{next(iter(biases.values())).name!r}, and {embeddings}. Formats 'merged' and 'checkpoint_patch' can hold "
            "both."
        )
    factors = {module: _with_pair(part, approximate(part.delta, rank)) for module, part in weights.items()}
    rank = max((found.left.shape[1] for found in factors.values()), default=1)
    tensors = {}
    for part in {part.module: part for part in adapter.parts}.values():
        shape = part.layer.parameters_below()["weight"].shape
        found = factors.get(part.module) or Factors(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]), 0.0, 0.0)
        tensors[part.module] = _named(part, found, rank)
        if biases:
            tensors[part.module]["lora_B.bias"] = _bias(part, biases.get(part.module))
    linear = [part.layer.get_base_layer() for part in adapter.parts if isinstance(part.layer, SamLinear)]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_bias=bool(biases),
        fan_in_fan_out=bool(linear) and all(isinstance(base, Conv1D) for base in linear),
        **adapter.common_fields(),
    )
    lost = {weights[module].name: (found.missing, found.whole) for module, found in factors.items()}
    lost |= {part.name: (0.0, float(part.delta.values.square().sum())) for part in biases.values()}
    return StockAdapter(config, tensors, lost)


def _with_pair(part: Part, found: Factors) -> Factors:
    """The factors of a sparse Δ, and those of the pair beside it."""
    if part.pair is None:
        return found
    left, right = part.pair.lora_B.float() * part.pair.scaling, part.pair.lora_A.float()
    if part.pair.transposed:
        left, right = right.t(), left.t()
    whole = (left @ right).double().flatten()
    whole = whole.index_add(0, part.delta.checked_indices(), part.delta.values.double())
    left = torch.cat([found.left.to(left), left], 1)
    return Factors(left, torch.cat([found.right.to(right), right]), found.missing, float(whole.square().sum()))


def like_experts(stock: StockAdapter) -> set[str]:
    """The modules that a LoRA config can name by their parameter, where PEFT may take their names for experts'."""
    if not isinstance(stock.config, LoraConfig) or stock.config.lora_bias or stock.config.fan_in_fan_out:
        return set()
    return {module for module in stock.tensors if module.rpartition(".")[2] in EXPERTS}


def _named(part: Part, factors: Factors, rank: int) -> dict[str, Tensor]:
    """Both matrices under LoRA's names, widened by zeros to `rank`.

    `A` is (rank × inputs) and `B` (outputs × rank), whether the weight is stored as (outputs × inputs), as in
    `nn.Linear`, or as (inputs × outputs), as in `Conv1D` and embeddings.
    """
    spare = rank - factors.left.shape[1]
    left, right = pad(factors.left, (0, spare)), pad(factors.right, (0, 0, 0, spare))
    if isinstance(part.layer, SamEmbedding):
        return {"lora_embedding_A": left.t(), "lora_embedding_B": right.t()}
    if isinstance(part.layer.get_base_layer(), Conv1D):
        left, right = right.t(), left.t()
    return {"lora_A.weight": right, "lora_B.weight": left}


def _bias(part: Part, of_bias: Part | None) -> Tensor:
    """Δ of the layer's bias, dense; zeros where there is none."""
    shape = part.layer.parameters_below()["weight"].shape
    outputs = shape[1] if isinstance(part.layer.get_base_layer(), Conv1D) else shape[0]
    dense = torch.zeros(outputs, device=part.delta.values.device)
    if of_bias is None:
        return dense
    return dense.index_copy(0, of_bias.delta.checked_indices(), of_bias.delta.values.detach().float())
