"""From statistics to a `Selection`: scores, budget, threshold. Works on any named parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from peft_sam.choosing.processes import Processes
from peft_sam.choosing.shards import is_sharded, local, sharing, start_of
from peft_sam.choosing.share import Share, reach
from peft_sam.choosing.threshold import NEVER, bits_of, budget_of, largest
from peft_sam.scores import BUDGETS, MADE_INPUTS, SCORES
from peft_sam.selection import Selection

# Entries whose scores exist at a time; also fixes how the noise of a seeded score is drawn.
CHUNK = 1 << 22
# Statistics that are zero where no gradient arrives: such an entry would not be trained, either.
GRADIENTS = {"gradient", "squared_gradient", "movement"}


def choose(
    parameters: Mapping[str, Tensor],
    *,
    score: str = "sam",
    density: float = 0.005,
    budget: str = "global",
    seed: int = 0,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    exclude: Mapping[str, Tensor] | None = None,
) -> Selection:
    """Select the entries of `parameters` with the largest scores.

    NaN is never selected, nor is an entry without any gradient in the statistics, nor an excluded one: where fewer than
    k are left, only these are selected.

    Args:
        parameters: name → candidate, in the order that breaks ties. Of sharded ones (FSDP2) each process brings the
            statistics of its shard, and all call this; every process gets the whole selection.
        score: a row of `scores.SCORES`.
        density, budget: p and how k comes from it, as in `SamConfig`.
        seed: of the scores with noise.
        statistics: statistic → parameter name → tensor, for a score that needs data.
        exclude: parameter name → flat positions that are left alone.

    Raises:
        ValueError: if there is no such score, budget or density, a statistic is missing, k is 0, or a candidate that
            the score reads has no storage (meta device).
    """
    _check(score, density, budget, parameters, statistics or {}, exclude or {})
    statistics, exclude = statistics or {}, exclude or {}
    over = sharing(parameters) if SCORES[score].reads_tensors else None
    scores, share = {}, Share()
    for name, parameter in parameters.items():
        inputs = {kind: of[name] for kind, of in statistics.items()}
        part = parameter if over is None else local(parameter)
        if over is not None and over.rank and not is_sharded(parameter):
            # all processes hold the same: the first answers for them
            part, inputs = part.flatten()[:0], {kind: tensor.flatten()[:0] for kind, tensor in inputs.items()}
        never = exclude.get(name)
        if never is not None and over is not None:
            never = within(never, start_of(parameter), start_of(parameter) + part.numel())
        scores[name] = ChunkedScores(score, name, part, inputs, seed, never)
        share.add(inputs, scores[name].numel)
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    indices, thresholds = {name: torch.empty(0, dtype=torch.int64, device="cpu") for name in sizes}, []
    for names in [list(sizes)] if budget == "global" else [[name] for name in sizes]:
        if k := budget_of(density, sum(sizes[name] for name in names)):
            positions, smallest = largest({name: scores[name] for name in names}, k, over)
            indices.update(positions)
            thresholds.append(smallest)
    if not thresholds:
        raise_empty(density, sum(sizes.values()) if budget == "global" else max(sizes.values(), default=0))
    for name, found in indices.items():
        share.select(reach(scores[name].statistics, found), len(found))
    if over is not None:
        indices = _together({name: found + start_of(parameters[name]) for name, found in indices.items()}, over)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    lowest, left = min(thresholds), number_of(exclude, shapes)
    return Selection(indices, shapes, score, budget, density, lowest, share=share.share(over), excluded=left)


def _check(
    score: str,
    density: float,
    budget: str,
    parameters: Mapping[str, Tensor],
    statistics: Mapping[str, Mapping[str, Tensor]],
    exclude: Mapping[str, Tensor],
) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {sorted(SCORES)}; got {score!r}.")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {list(BUDGETS)}; got {budget!r}.")
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of entries to select, 0 < density <= 1; got {density!r}.")
    for what, given in (("statistics", statistics), ("exclude", exclude)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{what} must be a map with the names of parameters; got {type(given).__name__}.")
    for kind in SCORES[score].statistics:
        for name, parameter in parameters.items():
            found = statistics.get(kind, {}).get(name)
            if found is None:
                raise ValueError(f"score {score!r} needs the statistic {kind!r} of {name!r}: pass it in `statistics`.")
            if found.numel() != local(parameter).numel():
                raise ValueError(
                    f"the statistic {kind!r} of {name!r} has shape {tuple(found.shape)}, and the parameter "
                    f"{tuple(local(parameter).shape)}: pass that of the same parameter."
                )


def _together(indices: Mapping[str, Tensor], over: Processes) -> dict[str, Tensor]:
    """The positions that all processes found, by parameter; processes hold rows in their order."""
    lengths = over.each(torch.tensor([len(found) for found in indices.values()]))
    every = over.each(torch.cat(list(indices.values())))
    parts = [found.split(of_each.tolist()) for found, of_each in zip(every, lengths, strict=True)]
    return {name: torch.cat(found) for name, found in zip(indices, zip(*parts, strict=True), strict=True)}


def within(positions: Tensor, start: int, stop: int) -> Tensor:
    """Those of the positions from start to before stop, counted from start."""
    return positions[(positions >= start) & (positions < stop)] - start


def number_of(exclude: Mapping[str, Tensor], names: Iterable[str]) -> int:
    """How many entries of these parameters are excluded."""
    return sum(len(exclude[name]) for name in names if name in exclude)


def entries_asked_for(sizes: Iterable[int], density: float, budget: str) -> int:
    """k, from the sizes of the candidates."""
    if budget == "tensor":
        return sum(budget_of(density, size) for size in sizes)
    return budget_of(density, sum(sizes))


def raise_empty(density: float, entries: int) -> None:
    """Say that `density` of so many entries, of all candidates or of the largest, is not one entry."""
    raise ValueError(
        f"density {density} of {entries:,} entries is less than one entry: nothing would be trained. Use a density of "
        f"at least {1 / max(entries, 1):.2g}."
    )


class ChunkedScores:
    """The scores of one parameter, computed piece by piece each time they are asked for."""

    def __init__(
        self,
        score: str,
        name: str,
        parameter: Tensor,
        statistics: Mapping[str, Tensor],
        seed: int,
        never: Tensor | None = None,
    ) -> None:
        self.row, self.name, self.statistics, self.never = SCORES[score], name, statistics, never
        self.numel = next(iter(statistics.values()), parameter).numel()
        # the CPU generator reads 32 bits of its seed
        self.seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")
        self.is_bias = parameter.ndim == 1 and name.rpartition(".")[2].endswith("bias")
        sources = {"weight": parameter, **statistics}
        self.sources = {kind: sources[kind].detach() for kind in self.row.inputs if kind not in MADE_INPUTS}
        for kind, tensor in self.sources.items():
            if tensor.is_meta:
                raise ValueError(
                    f"score {score!r} needs the {kind} of {name!r}, which is on the meta device: load the model's "
                    "weights before selecting."
                )

    def __call__(self) -> Iterator[Tensor]:
        """The scores' bits, in flat order; those of entries without a gradient, or excluded, are never to win."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        flat = {kind: tensor.flatten() for kind, tensor in self.sources.items()}
        for start in range(0, self.numel, CHUNK):
            stop = min(start + CHUNK, self.numel)
            inputs = {kind: tensor[start:stop] for kind, tensor in flat.items()}
            if "noise" in self.row.inputs:
                inputs["noise"] = torch.rand(stop - start, generator=generator, dtype=torch.float32, device="cpu")
            if "is_bias" in self.row.inputs:
                inputs["is_bias"] = torch.full((stop - start,), float(self.is_bias), device="cpu")
            bits = bits_of(self.row.function(**inputs))
            for kind in GRADIENTS & inputs.keys():
                bits.masked_fill_(inputs[kind] == 0, NEVER)
            if self.never is not None:
                bits[within(self.never, start, stop).to(bits.device)] = NEVER
            yield bits
