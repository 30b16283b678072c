"""Choosing within bounded memory: the pass runs over some candidates at a time, and the best of each are kept.

The k largest of all are among the k largest of each group, so nothing is lost: the selection is the one that a single
pass makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from peft_sam.choosing.choose import ChunkedScores, number_of, raise_empty, within
from peft_sam.choosing.share import Share, reach
from peft_sam.choosing.sums import raise_no_gradient
from peft_sam.choosing.threshold import budget_of, largest
from peft_sam.selection import Selection

# Parameter name → the flat positions (start, stop) of it that belong to a group; at most one piece of a parameter.
Group = Mapping[str, tuple[int, int]]


def groups_within(sizes: Mapping[str, int], entries: int) -> Sequence[Group]:
    """Consecutive groups of at most so many entries that cover parameters of these sizes, splitting where needed."""
    groups: list[dict[str, tuple[int, int]]] = [{}]
    room = entries
    for name, size in sizes.items():
        start = 0
        while start < size:
            if room == 0:
                groups.append({})
                room = entries
            stop = min(size, start + room)
            groups[-1][name] = (start, stop)
            room, start = room - (stop - start), stop
    return groups


class _Kept:
    """The best entries of one piece: their positions in the parameter, the bits of their scores, and their reach."""

    def __init__(self, start: int, positions: Tensor, scores: ChunkedScores) -> None:
        found, begin = [], 0
        for chunk in scores():
            inside = within(positions, begin, begin + len(chunk))
            found.append(chunk.cpu().index_select(0, inside))
            begin += len(chunk)
        self.positions, self.bits = positions + start, torch.cat(found)
        self.reach = reach(scores.statistics, positions)

    def __call__(self) -> Sequence[Tensor]:
        return (self.bits,)

    def keep(self, which: Tensor) -> None:
        """Only these of them."""
        self.positions, self.bits = self.positions[which], self.bits[which]
        self.reach = None if self.reach is None else self.reach[which]


class _Best:
    """The k best entries seen so far of some parameters together; ties are broken as in `largest`."""

    def __init__(self, names: Sequence[str], k: int) -> None:
        self.k, self.pieces = k, {name: list[_Kept]() for name in names}

    def add(self, group: Group, scores: Mapping[str, ChunkedScores]) -> None:
        """See the scores of a group's pieces."""
        mine = {name: scores[name] for name in self.pieces if name in group}
        k = min(self.k, sum(of_one.numel for of_one in mine.values()))
        positions, _ = largest(mine, k)
        for name, of_one in mine.items():
            self.pieces[name].append(_Kept(group[name][0], positions[name], of_one))
        flat = {f"{name} {i}": piece for name, pieces in self.pieces.items() for i, piece in enumerate(pieces)}
        winners, _ = largest(flat, min(self.k, sum(len(piece.bits) for piece in flat.values())))
        for key, piece in flat.items():
            piece.keep(winners[key])

    def indices(self, name: str) -> Tensor:
        """The positions of the best in one of the parameters."""
        found = [piece.positions for piece in self.pieces[name]]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")

    def lowest(self) -> float:
        """The smallest score among the best."""
        bits = [piece.bits for pieces in self.pieces.values() for piece in pieces if len(piece.bits)]
        return min((float(of_one.min().view(torch.float32)) for of_one in bits), default=float("inf"))


def choose_by_groups(
    parameters: Mapping[str, Tensor],
    groups: Sequence[Group],
    statistics_of: Callable[[Group], Mapping[str, Mapping[str, Tensor]]],
    *,
    score: str,
    density: float,
    budget: str,
    exclude: Mapping[str, Tensor] | None = None,
) -> Selection:
    """`choose`, for a score that needs data, with statistics of one group at a time.

    Args:
        groups: cover all parameters in order (`groups_within`).
        statistics_of: runs the pass for a group: statistic → parameter name → the piece's entries, flat.

    Raises:
        ValueError: if k is 0.
    """
    exclude = exclude or {}
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    together = [list(sizes)] if budget == "global" else [[name] for name in sizes]
    totals = [sum(sizes[name] for name in names) for names in together]
    bests = [_Best(names, budget_of(density, total)) for names, total in zip(together, totals, strict=True)]
    if not any(best.k for best in bests):
        raise_empty(density, max(totals, default=0))
    reached, share = False, Share()
    for group in groups:
        statistics = statistics_of(group)
        reached = reached or any(bool(of[name].any()) for of in statistics.values() for name in group)
        inputs = {name: {kind: of[name] for kind, of in statistics.items()} for name in group}
        never = {name: within(exclude[name], *group[name]) for name in group if name in exclude}
        scores = {
            name: ChunkedScores(score, name, parameters[name], inputs[name], 0, never.get(name)) for name in group
        }
        for name, of_one in scores.items():
            share.add(inputs[name], of_one.numel)
        for best in bests:
            best.add(group, scores)
    if not reached:
        raise_no_gradient(len(parameters))
    indices = {name: best.indices(name) for best in bests for name in best.pieces}
    for kept in (piece for best in bests for pieces in best.pieces.values() for piece in pieces):
        share.select(kept.reach, len(kept.positions))
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    lowest, left = min(best.lowest() for best in bests), number_of(exclude, shapes)
    return Selection(indices, shapes, score, budget, density, lowest, share=share.share(), excluded=left)
