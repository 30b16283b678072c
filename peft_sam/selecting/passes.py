"""The passes over the data that one selection needs, within a memory budget."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import convert_bytes, convert_file_size_to_int
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_sam.choosing.choose import choose
from peft_sam.choosing.curvature import damped
from peft_sam.choosing.gradients import GradientStatistics, accumulate
from peft_sam.choosing.groups import Group, choose_by_groups, groups_within
from peft_sam.choosing.linear_calls import LinearCall
from peft_sam.choosing.movement import rehearse
from peft_sam.choosing.processes import Processes
from peft_sam.choosing.shards import sharing
from peft_sam.config import CURVATURES, SamConfig
from peft_sam.layers.linear import SamLinear
from peft_sam.scores import SCORES
from peft_sam.selecting.batches import Source
from peft_sam.selecting.order import replayed
from peft_sam.selection import Selection
from peft_sam.tuner.candidates import candidates_of, hidden_of, trained_besides

# So many batches are read of a loader that cannot say how many it has, and may go on without end.
STREAM = 1000
# A pass over more batches than so many says that it could read fewer.
MANY = 200
# One pass with accumulators in host memory is taken for cheaper than more than so many passes without: it moves every
# gradient of every batch to the host and adds it there.
PASSES_WORTH_THE_HOST = 4


class Passes(NamedTuple):
    """What each pass accumulates, and whether it does so in host memory."""

    groups: Sequence[Group]
    in_host_memory: bool

    def __str__(self) -> str:
        where = "accumulators in host memory" if self.in_host_memory else "accumulators next to the parameters"
        number = len(self.groups)
        return f"{number} passes over the data, {where}" if number > 1 else f"1 pass over the data, {where}"


def plan_passes(sizes: Mapping[str, int], entry: int, budget: int, device: torch.device, host: int) -> Passes:
    """The cheapest passes for candidates of these sizes.

    Args:
        sizes: candidate → entries.
        entry: bytes of the statistics of one entry.
        budget: bytes on the device.
        device: where the parameters are.
        host: bytes of host memory that may be taken.
    """
    groups = groups_within(sizes, budget // entry)
    needed = entry * sum(sizes.values())
    if device.type != "cpu" and len(groups) > PASSES_WORTH_THE_HOST and needed <= host:
        return Passes(_all(sizes), True)
    return Passes(groups, False)


def _all(sizes: Mapping[str, int]) -> Sequence[Group]:
    """One group of everything."""
    return [{name: (0, size) for name, size in sizes.items()}]


def select_by_data(
    model: nn.Module,
    adapted: nn.Module,
    adapter_name: str,
    config: SamConfig,
    source: Source,
    *,
    max_batches: int | None,
    memory_budget: float | str | None,
    train_mode: bool,
    processes: Processes | None,
    progress: bool,
    exclude: Mapping[str, Tensor],
) -> Selection:
    """Run the passes of `model` for a pending adapter of `adapted`, itself or a part of it, and choose."""
    candidates = candidates_of(adapted, adapter_name)
    batches, loss = source.batches, source.loss
    passes = _passes(candidates, config, memory_budget)
    options: dict[str, Any] = {
        "score": config.score,
        "density": config.density,
        "budget": config.budget,
        "exclude": exclude,
    }
    if "movement" in config.statistics:
        steps, besides = _steps(source, max_batches, processes), trained_besides(model)
        found = rehearse(model, candidates, besides, batches, loss, steps=steps, processes=processes, progress=progress)
        return _told(choose(candidates, statistics=found.tensors, **options), [found], source)
    calls, alone = _linear_calls(adapted, adapter_name), len(passes.groups) == 1
    again = iter([batches]) if alone else replayed(batches)
    most = most_batches(source, max_batches)
    if progress and memory_budget is not None:
        tqdm.write(f"memory_budget={memory_budget!r}: {passes}.")
    if progress and max_batches is None and (length := _length(batches)) is not None and length > MANY:
        tqdm.write(f"The pass reads all {length:,} batches; max_batches=... would read only the first so many.")
    seen: list[GradientStatistics] = []

    def run(group: Group) -> Mapping[str, Mapping[str, Tensor]]:
        found = accumulate(
            model,
            {name: candidates[name] for name in group},
            _first(next(again), most),
            loss,
            statistics=config.statistics,
            train_mode=train_mode,
            probes=config.probes,
            seed=config.seed,
            hidden={name: call for name, call in calls.items() if name in group},
            pieces={} if alone else group,
            in_host_memory=passes.in_host_memory,
            processes=processes,
            total=_least(_length(batches), most),
            progress=progress,
        )
        seen.append(found)
        return _curved(candidates, config, found.tensors)

    if alone:
        selection = choose(candidates, statistics=run(passes.groups[0]), **options)
    else:
        selection = choose_by_groups(candidates, passes.groups, run, **options)
    _warn_of_stream(source, max_batches, seen[-1].batches)
    return _told(selection, seen, source)


def _told(selection: Selection, passes: Sequence[GradientStatistics], source: Source) -> Selection:
    """The selection, with the extent of the passes that it is from."""
    selection.samples, selection.batches, selection.unit = passes[-1].samples, passes[-1].batches, source.counts.unit
    selection.seconds = sum(one.seconds for one in passes)
    return selection


def most_batches(source: Source, max_batches: int | None) -> int | None:
    """How many batches a pass reads at most; None: all that there are."""
    if max_batches is not None or _length(source.batches) is not None:
        return max_batches
    return _least(source.steps, STREAM)


def _warn_of_stream(source: Source, max_batches: int | None, read: int) -> None:
    if most_batches(source, max_batches) == STREAM and max_batches is None and read >= STREAM:
        warnings.warn(
            f"the loader cannot say how many batches it has, and the pass stopped after {STREAM:,}: pass max_batches "
            "to read fewer, or more.",
            UserWarning,
            stacklevel=4,
        )


def _curved(
    candidates: Mapping[str, Tensor], config: SamConfig, statistics: Mapping[str, Mapping[str, Tensor]]
) -> Mapping[str, Mapping[str, Tensor]]:
    """The statistics as the score names them."""
    if "curvature" not in SCORES[config.score].inputs:
        return statistics
    source = CURVATURES[config.curvature]
    curvature = damped(statistics[source], config.damping, config.absolute_damping, sharing(candidates))
    return {"curvature": curvature, **{kind: of for kind, of in statistics.items() if kind != source}}


def _passes(candidates: Mapping[str, Tensor], config: SamConfig, memory_budget: float | str | None) -> Passes:
    """The passes within a budget.

    Raises:
        ValueError: if the budget is no size, or the score cannot be computed for some candidates at a time.
    """
    if memory_budget is not None and "movement" in config.statistics:
        raise ValueError(
            "memory_budget divides the statistics of a pass, and score 'movement' has none: it trains all candidates "
            "together, which takes five float32 numbers an entry. Leave memory_budget out."
        )
    sizes = {name: parameter.numel() for name, parameter in candidates.items()}
    if memory_budget is None:
        return Passes(_all(sizes), False)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, float, str)):
        raise ValueError(f"memory_budget is a number of bytes or a text as '8GiB'; got {memory_budget!r}.")
    budget = convert_file_size_to_int(memory_budget) if isinstance(memory_budget, str) else int(memory_budget)
    widest = max(torch.promote_types(p.dtype, torch.float32).itemsize for p in candidates.values())
    entry = widest * len(config.statistics)
    if budget < entry:
        raise ValueError(f"memory_budget={memory_budget!r} does not hold the statistics of one entry, {entry} bytes.")
    host = psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    passes = plan_passes(sizes, entry, budget, next(iter(candidates.values())).device, host)
    if len(passes.groups) > 1 and sharing(candidates):
        raise ValueError(
            f"memory_budget={memory_budget!r} asks for several passes ({convert_bytes(entry * sum(sizes.values()))} of "
            "statistics in all), which a sharded model cannot make: leave it out, each process holds its shard only."
        )
    if len(passes.groups) > 1 and "curvature" in SCORES[config.score].inputs and not config.absolute_damping:
        raise ValueError(
            "damping is a share of the mean over all candidates, which one pass must see together: set "
            "absolute_damping=True, or leave out memory_budget."
        )
    return passes


def _steps(source: Source, max_batches: int | None, processes: Processes | None) -> int:
    """Of a rehearsal: as many on every process.

    Raises:
        ValueError: if nobody knows how many batches there are.
    """
    lengths = (max_batches, _length(source.batches), source.steps)
    steps = next((length for length in lengths if length is not None), None)
    if steps is None:
        raise ValueError(
            "score 'movement' must know how many steps to take, and the loader has no length: pass max_batches."
        )
    return max(1, *processes.objects(steps)) if processes else max(1, steps)


def _linear_calls(model: nn.Module, adapter_name: str) -> dict[str, LinearCall]:
    """The layers that tell the gradients of quantised and offloaded candidates.

    Raises:
        ValueError: if such a candidate is no linear layer's.
    """
    calls = {}
    for name, (layer, there) in hidden_of(model, adapter_name).items():
        if not isinstance(layer, SamLinear):
            raise ValueError(
                f"{name} is quantised or offloaded, and only linear layers tell such a parameter's gradient. Leave the "
                "module out with exclude_modules, keep it in memory in full precision, or pass a selection made there."
            )
        calls[name] = LinearCall(layer.get_base_layer(), there, layer.transposed)
    return calls


def _first(batches: Iterable[Any], number: int | None) -> Iterator[Any]:
    """The first batches; a loader draws its seed at the first of them, where the pass keeps the random states."""
    yield from itertools.islice(batches, number)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a loader over an iterable dataset
        return None


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
