"""Adapters out of adapters: weighted sums and the like on the union of their supports."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_sam._peft import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from peft_sam.files.fingerprint import fingerprints
from peft_sam.layers.base import SamLayer
from peft_sam.layers.found import sam_layers
from peft_sam.layers.low_rank import LowRank
from peft_sam.layers.owned import head_of
from peft_sam.selection import Selection
from peft_sam.sparse.delta import PendingAdapterError, SparseDelta
from peft_sam.tuner.injection import withdraw

# combination → of values (one tensor per adapter), weights, density, and how the majority sign is found
COMBINATIONS: dict[str, Callable[[list[Tensor], Tensor, float | None, str], Tensor]] = {
    "linear": lambda values, weights, density, sign: task_arithmetic(values, weights),
    "ties": lambda values, weights, density, sign: ties(values, weights, density, sign),
    "dare_linear": lambda values, weights, density, sign: dare_linear(values, weights, density),
    "dare_ties": lambda values, weights, density, sign: dare_ties(values, weights, density, sign),
    "magnitude_prune": lambda values, weights, density, sign: magnitude_prune(values, weights, density),
}


def check_combination(number: int, weights: Sequence[float], combination: str, density: float | None) -> None:
    """Whether so many adapters can be combined so.

    Raises:
        ValueError: if not; says what was expected.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {list(COMBINATIONS)}; got {combination!r}.")
    if number != len(weights) or not number:
        raise ValueError(
            f"expected one weight for each of the adapters, at least one; got {number} and {len(weights)}."
        )
    if combination != "linear" and (density is None or not 0 < density <= 1):
        raise ValueError(f"combination_type {combination!r} needs a density, 0 < density <= 1; got {density}.")


def changing(layers: Mapping[str, SamLayer], adapters: Iterable[str], action: str) -> list[str]:
    """The adapters that are not pending; warns of those that are, which are `action` (merged, combined) as nothing."""
    adapters = list(adapters)
    every = [(name, delta) for name in adapters for layer in layers.values() for delta in layer.deltas(name).values()]
    pending = {name for name, delta in every if delta.pending}
    if pending:
        warnings.warn(
            f"The SAM adapters {sorted(pending)} are {action} as nothing: no parameters are selected yet. That is what "
            "peft_sam.select_parameters(trainer) does, once before training.",
            stacklevel=3,
        )
    return [name for name in adapters if name not in pending]


@torch.no_grad()
def combine(
    deltas: Sequence[SparseDelta | None],
    combination: str,
    *,
    weights: Sequence[float],
    density: float | None,
    majority_sign_method: str,
) -> tuple[Tensor, Tensor]:
    """Indices and values of a combination of the deltas of one parameter, in float32 or better.

    The support is the union of theirs; where one has no entry it has the value 0. `density` and majority signs are of
    the union, too.

    Args:
        deltas: one per adapter; None where an adapter does not change the parameter.
    """
    found = [delta for delta in deltas if delta is not None]
    device = found[0].values.device
    union = torch.unique(torch.cat([delta.indices.to(device) for delta in found]))
    dtype = torch.promote_types(found[0].values.dtype, torch.float32)
    every = []
    for delta in deltas:
        values = torch.zeros(len(union), dtype=dtype, device=device)
        if delta is not None:
            places = torch.searchsorted(union, delta.indices.to(device))
            values.index_copy_(0, places, delta.values.to(device, dtype))
        every.append(values)
    of_weights = torch.tensor(weights, dtype=dtype, device=device)
    return union, COMBINATIONS[combination](every, of_weights, density, majority_sign_method)


@torch.no_grad()
def combine_heads(
    model: nn.Module,
    adapters: Sequence[str],
    adapter_name: str,
    combination: str,
    *,
    weights: Sequence[float],
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Give an adapter the heads (`modules_to_save`) that combine what others changed: H⁰ + Σ weight · (H - H⁰).

    H⁰ is the head that the model has without adapters; an adapter without a head has not changed it.
    """
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in wrapper.modules_to_save:
            continue
        heads = [head_of(wrapper, name) for name in adapters]
        for name, new in head_of(wrapper, adapter_name).named_parameters():
            start = wrapper.original_module.get_parameter(name).double()
            changes = [head.get_parameter(name).double() - start for head in heads]
            of_weights = torch.tensor(weights, dtype=start.dtype, device=start.device)
            new.copy_(start + COMBINATIONS[combination](changes, of_weights, density, majority_sign_method))


def check_pairs(layers: Mapping[str, SamLayer], adapters: Iterable[str], combination: str) -> None:
    """Whether the low-rank pairs of adapters, if they have any, can be combined so.

    Raises:
        ValueError: if not: only sums of them are low-rank again.
    """
    having = [name for name, pairs in _pairs(layers, adapters).items() if pairs]
    if having and combination != "linear":
        raise ValueError(
            f"combination_type {combination!r} picks entries, and adapters {having} have low-rank pairs (r), which "
            "change all of them: use 'linear'."
        )


def _pairs(layers: Mapping[str, SamLayer], adapters: Iterable[str]) -> dict[str, dict[str, LowRank]]:
    """Adapter → module → its low-rank pair; pending adapters have none, unless all are pending."""
    every = {name: [d for layer in layers.values() for d in layer.deltas(name).values()] for name in adapters}
    changing = {name for name, deltas in every.items() if not any(delta.pending for delta in deltas)} or every.keys()
    return {
        name: {m: pair for m, layer in layers.items() if name in changing and (pair := layer.pair(name)) is not None}
        for name in every
    }


def add_combined(
    tuner: Any, adapters: Sequence[str], adapter_name: str, combination: str, how: Mapping[str, Any]
) -> None:
    """What `SamModel.add_weighted_adapter` does; the model is as before if that fails. `how` is that of `combine`."""
    check_combination(len(adapters), how["weights"], combination, how["density"])
    if adapter_name in tuner.peft_config:
        raise ValueError(f"there is an adapter {adapter_name!r} already: delete it, or choose another name.")
    for name in adapters:
        if not tuner.sparse_deltas(name) and tuner.peft_config[name].selection is not None:
            raise PendingAdapterError(name, "combined")
        if tuner.peft_config[name].trainable_token_indices:
            raise ValueError(f"adapter {name!r} has trainable_token_indices, which cannot be combined.")
    layers = sam_layers(tuner.model)
    check_pairs(layers, adapters, combination)
    all_pending = not changing(layers, adapters, "combined")
    combined = Combined(layers, adapters, combination, **how)
    config = copy.copy(tuner.peft_config[adapters[0]])
    if not all_pending:
        config.target_modules = list(dict.fromkeys([*combined.parts, *sorted(combined.paired)]))
        config.target_parameters = config.exclude_modules = None
        config.layers_to_transform = config.layers_pattern = None
        config.record(combined.summary(), {})
    config.r, config.lora_alpha, config.lora_dropout = combined.r, combined.r and float(combined.r), 0.0
    heads = {head for name in adapters for head in tuner.peft_config[name].modules_to_save or ()}
    config.modules_to_save = sorted(heads) or None
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    try:
        combined.put(adapter_name)
        combine_heads(tuner.model, adapters, adapter_name, combination, **how)
        if not all_pending:
            kept = fingerprints(sam_layers(tuner.model), adapter_name)
            tuner.peft_config[adapter_name].record(combined.summary(), kept)
    except BaseException:
        withdraw(tuner, adapter_name)
        raise


class Combined:
    """A combination of adapters of a model, layer by layer; `how` is that of `combine`.

    Attributes:
        parts: module → parameter → (indices, values); modules that none of the adapters changes are left out.
        r: the rank of the pairs that are the sum of theirs, one below the other; None if they have none.
        pairs: of each adapter, by module.
        starts: where in these the pairs of each adapter begin.
        paired: the modules that have any.
    """

    def __init__(self, layers: Mapping[str, SamLayer], adapters: Sequence[str], combination: str, **how: Any) -> None:
        self.layers, self.combination = layers, combination
        self.weights = how["weights"]
        self.adapters, pairs = adapters, _pairs(layers, adapters)
        self.pairs = [pairs[name] for name in adapters]
        ranks = [next((pair.r for pair in of.values()), 0) for of in self.pairs]
        self.r = sum(ranks) or None
        self.starts = [sum(ranks[:number]) for number in range(len(ranks))]
        self.paired: set[str] = set().union(*self.pairs)
        self.parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for module, layer in layers.items():
            every = [{n: d for n, d in layer.in_force(name).items() if not d.pending} for name in adapters]
            names = dict.fromkeys(itertools.chain(*every))
            if names:
                self.parts[module] = {
                    name: combine([of.get(name) for of in every], combination, **how) for name in names
                }

    def summary(self) -> dict[str, Any]:
        """What the config of the new adapter says of its support."""
        indices = {f"{module}.{name}": i for module, parts in self.parts.items() for name, (i, _) in parts.items()}
        layers = {module: self.layers[module].parameters_below() for module in self.parts}
        shapes = {f"{module}.{name}": p.shape for module, own in layers.items() for name, p in own.items()}
        k, m = sum(map(len, indices.values())), sum(shape.numel() for shape in shapes.values())
        return Selection(indices, shapes, self.combination, "union", k / m, 0.0).summary()

    def put(self, adapter_name: str) -> None:
        """Give an injected adapter these deltas."""
        for module, parts in self.parts.items():
            supports, values = ({name: both[i] for name, both in parts.items()} for i in (0, 1))
            self.layers[module].set_support(adapter_name, supports, values)
        for module, layer in self.layers.items():
            layer.reset_pair(adapter_name)
            if (new := layer.pair(adapter_name)) is not None:
                self._put_pair(module, new)

    @torch.no_grad()
    def _put_pair(self, module: str, new: LowRank) -> None:
        new.lora_B.zero_()
        scaling = self.layers[module].scaling
        for name, pairs, weight, start in zip(self.adapters, self.pairs, self.weights, self.starts, strict=True):
            if (pair := pairs.get(module)) is not None:
                rows = slice(start, start + pair.r)
                new.lora_A[rows] = pair.lora_A
                new.lora_B[:, rows] = pair.lora_B * (weight * scaling.get(name, 1.0) * pair.scaling / new.scaling)
