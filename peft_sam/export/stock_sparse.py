"""Adapters of PEFT's own sparse tuners that add the same numbers to the same entries.

Both store as many entries of each layer as one number in their config says. Where a support has fewer, entries of
the value -0.0 are added at unused positions: x + (-0.0) has the bits of x, for every x.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from peft import PeftConfig, ShiraConfig, SupertuningConfig
from torch import Tensor, nn

from peft_sam.export.parts import Adapter, Part
from peft_sam.layers.linear import SamLinear
from peft_sam.sparse.delta import changed


class StockAdapter(NamedTuple):
    """An adapter of stock PEFT.

    Attributes:
        config: without target modules.
        tensors: module in the base model → name below it → tensor.
        lost: parameter → ‖Δ - its approximation‖² and ‖Δ‖²; empty where nothing is approximated.
    """

    config: PeftConfig
    tensors: dict[str, dict[str, Tensor]]
    lost: dict[str, tuple[float, float]]


def is_linear_weight(part: Part) -> bool:
    """Whether stock PEFT's sparse tuners can change this parameter: the weight of an `nn.Linear`, its alone."""
    linear = isinstance(part.layer, SamLinear) and isinstance(part.layer.get_base_layer(), nn.Linear)
    right = linear and part.parameter == "weight" and not part.layer.is_shared("weight")
    # both store float32 values and int32 positions
    return right and part.readable and part.base.dtype.itemsize <= 4 and part.delta.shape.numel() <= 2**31


def supertuning(adapter: Adapter) -> StockAdapter:
    """A Super-Tuning adapter: `supertuning_indices`, flat and int32, and `supertuning_values` in θ⁰'s dtype; beside
    them the low-rank pairs, as they are.

    Super-Tuning rounds a value to θ⁰'s dtype before it adds it; the values are chosen so that the sum has the bits of
    θ⁰ + Δ all the same. Where no single value leads there (on a half-precision base, some sums that cross zero) a
    position comes twice, with -θ⁰ and with the sum. Both are added exactly in the order of the file or in float32, as
    on a CPU; a device that adds them in another order and rounds in between may end one rounding off.

    Raises:
        ValueError: if a layer would need more entries than it has.
    """
    entries = {part.module: addends(part) for part in adapter.parts}
    numels = {part.module: part.delta.shape.numel() for part in adapter.parts}
    sparsity = common_sparsity({module: len(indices) for module, (indices, _) in entries.items()}, numels)
    tensors = {}
    for module, (indices, values) in entries.items():
        indices, values = _padded(indices, values, kept_entries(numels[module], sparsity), numels[module])
        tensors[module] = {"supertuning_indices": indices.to(torch.int32), "supertuning_values": values}
    for part in adapter.parts:
        for name, factor in part.pair.named_parameters() if part.pair is not None else ():
            tensors[part.module][f"supertuning_{name}.weight"] = factor.float()
    own = adapter.config
    pairs = {"r": own.r, "lora_alpha": own.lora_alpha, "lora_dropout": own.lora_dropout} if adapter.pairs else {}
    return StockAdapter(SupertuningConfig(sparsity=sparsity, **pairs, **adapter.common_fields()), tensors, {})


def addends(part: Part) -> tuple[Tensor, Tensor]:
    """Positions and values that, added in this order in θ⁰'s dtype, make θ⁰ + Δ."""
    indices, values = part.delta.checked_indices(), part.delta.values.detach()
    entries = part.base.detach().take(indices)
    if values.dtype == entries.dtype:
        return indices, values
    goal = changed(entries, values)
    values = (goal.double() - entries.double()).to(entries.dtype)
    missed = entries + values != goal
    values = torch.where(missed, -entries, values)
    return torch.cat([indices, indices[missed]]), torch.cat([values, goal[missed]])


def common_sparsity(counts: Mapping[str, int], numels: Mapping[str, int]) -> float:
    """The largest sparsity, to rounding, with which Super-Tuning makes room for the count of each layer.

    Raises:
        ValueError: if a count is larger than the layer.
    """
    share, module = max((count / numels[module], module) for module, count in counts.items())
    if share > 1:
        raise ValueError(
            f"format 'supertuning' would need {counts[module]:,} entries for {module!r}, which has {numels[module]:,}: "
            "its sums cross zero too often in half precision. Formats 'merged' and 'checkpoint_patch' can hold them."
        )
    step = 0.0
    while any(kept_entries(numels[name], 1 - min(share + step, 1)) < count for name, count in counts.items()):
        step = 2 * step or 2**-53
    return 1 - min(share + step, 1)


def kept_entries(numel: int, sparsity: float) -> int:
    """How many entries of a layer of `numel` Super-Tuning trains: its formula, in its arithmetic."""
    return int(numel * (1 - sparsity))


def shira(adapter: Adapter) -> StockAdapter:
    """A SHiRA adapter: `shira_indices` of shape (2, n), int32, and `shira_weight`, n = r (inputs + outputs).

    r is the smallest with which every layer's entries fit.

    Raises:
        ValueError: if that r is too large for another layer of the adapter.
    """
    r = max(-(-len(part.delta.values) // sum(part.delta.shape)) for part in adapter.parts)
    tensors = {}
    for part in adapter.parts:
        numel, n = part.delta.shape.numel(), r * sum(part.delta.shape)
        if n > numel:
            raise ValueError(
                f"format 'shira' stores r * (inputs + outputs) entries of each layer; the fullest layer needs r = {r}, "
                f"with which {part.module!r} of shape {tuple(part.delta.shape)} would need {n:,} of its {numel:,}. "
                "Format 'supertuning' can hold them."
            )
        indices, values = _padded(part.delta.checked_indices(), part.delta.values.detach().float(), n, numel)
        columns = part.delta.shape[1]
        places = torch.stack([indices // columns, indices % columns]).to(torch.int32)
        tensors[part.module] = {"shira_indices": places, "shira_weight": values}
    return StockAdapter(ShiraConfig(r=r, **adapter.common_fields()), tensors, {})


def _padded(indices: Tensor, values: Tensor, n: int, numel: int) -> tuple[Tensor, Tensor]:
    """The entries and, up to `n`, entries of -0.0 at the first unused positions."""
    unused = torch.ones(numel, dtype=torch.bool, device=indices.device)
    unused[indices] = False
    padding = unused.nonzero().flatten()[: n - len(indices)]
    return torch.cat([indices, padding]), torch.cat([values, values.new_full((len(padding),), -0.0)])


def target_names(modules: Iterable[str], all_modules: Iterable[str]) -> list[str] | str:
    """`target_modules` that match these modules alone: their names, or an expression where a name is another's end."""
    wanted = list(modules)
    endings = tuple(f".{name}" for name in wanted)
    if any(name.endswith(endings) and name not in wanted for name in all_modules):
        return "|".join(map(re.escape, wanted))
    return wanted
