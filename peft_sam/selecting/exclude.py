"""Entries that a selection leaves alone: those of other adapters, so that the two can be added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from peft_sam.layers.found import deltas_of
from peft_sam.selection import Selection

Excluded = str | Selection


def excluded(
    model: nn.Module, candidates: Mapping[str, Tensor], exclude: Excluded | Iterable[Excluded] | None
) -> dict[str, Tensor]:
    """Candidate → flat positions in it that are left alone, sorted and once each.

    Args:
        model: with the adapters that are named.
        candidates: name → parameter; what else an adapter or a selection has makes no difference.
        exclude: names of adapters, or selections, or one of these.

    Raises:
        ValueError: if an adapter is not there or has no support yet, or a selection is of parameters of other shapes.
    """
    found: dict[str, list[Tensor]] = {}
    one_or_more = [] if exclude is None else [exclude] if isinstance(exclude, (str, Selection)) else exclude
    if not isinstance(one_or_more, Iterable):
        raise ValueError(f"exclude takes names of adapters and Selections; got a {type(exclude).__name__}.")
    for one in one_or_more:
        for name, positions in _supports(model, candidates, one).items():
            if name in candidates and len(positions):
                found.setdefault(name, []).append(positions.cpu())
    return {name: torch.cat(positions).unique() for name, positions in found.items()}


def _supports(model: nn.Module, candidates: Mapping[str, Tensor], one: Excluded) -> Mapping[str, Tensor]:
    if isinstance(one, Selection):
        if not one.shapes.keys() & candidates.keys():
            raise ValueError(
                f"the selection in exclude has no parameter in common with the candidates: it has "
                f"{next(iter(one.shapes), 'none')!r}, the model {next(iter(candidates), 'none')!r}."
            )
        for name in one.shapes.keys() & candidates.keys():
            if one.shapes[name] != candidates[name].shape:
                raise ValueError(
                    f"the selection in exclude was made for another base model: {name!r} has shape "
                    f"{tuple(one.shapes[name])} in it and {tuple(candidates[name].shape)} in this model."
                )
        return one.indices
    if not isinstance(one, str):
        raise ValueError(f"exclude takes names of adapters and Selections; got a {type(one).__name__}.")
    supports = {name: delta.indices for name, delta in deltas_of(model, one).items() if not delta.pending}
    if not supports:
        raise ValueError(f"exclude names {one!r}, and the model has no SAM adapter {one!r} with selected entries.")
    return supports
