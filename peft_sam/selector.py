"""`select_parameters`: the stairs between choosing and adapting.

Takes a Trainer, or a model and batches; runs the pass over the data; chooses; gives the adapter its support.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from peft_sam.batches import from_loader, from_trainer, replayed
from peft_sam.candidates import apply_selection, candidates_of, deltas_of, hidden_of
from peft_sam.checkpoint import sam_layers
from peft_sam.choosing import choose
from peft_sam.config import CURVATURES, SamConfig
from peft_sam.curvature import damped
from peft_sam.gradients import GradientStatistics, accumulate
from peft_sam.groups import Group, choose_by_groups, groups_within
from peft_sam.layer import selecting
from peft_sam.linear import SamLinear
from peft_sam.linear_calls import LinearCall
from peft_sam.scores import SCORES
from peft_sam.selection import Selection

if TYPE_CHECKING:
    from accelerate import Accelerator


def select_parameters(
    source: Trainer | nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    accelerator: Accelerator | None = None,
    adapter_name: str | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    count_fn: Callable[[Any], float] | None = None,
    max_batches: int | None = None,
    memory_budget: int | str | None = None,
    train_mode: bool = False,
    selection: Selection | None = None,
    progress: bool | None = None,
) -> Selection:
    """Choose the parameters that a pending SAM adapter trains. Once, before training.

    Runs the loss forward and backward over the data, with every random state, mode, gradient and flag put back
    afterwards, and selects the ⌊p·m⌋ entries with the largest score; for the default score, the entries where the
    gradient of the mean loss is largest.

    Args:
        source: a `transformers.Trainer` (its train dataloader, collator, `compute_loss`, device and precision are
            used), or a model with a SAM adapter together with `dataloader`.
        dataloader: batches, with a model. Dicts of tensors that the model takes, unless `loss_fn` is given.
        accelerator: an `accelerate.Accelerator` to share the batches over processes and for its precision.
        adapter_name: which adapter; the active one by default.
        loss_fn: (model, batch) → mean loss of the batch, with a model. By default `model(**batch).loss`.
        count_fn: batch → over how many samples its loss is a mean, which weights batches of unequal size. By
            default the number of target tokens where `labels` are token labels, else the number of examples.
        max_batches: stop after so many batches; None for all of them.
        memory_budget: for the statistics, in bytes or as "8GiB"; None for what one pass needs, a float32 number per
            candidate entry and statistic. With less, the pass is repeated for some candidates at a time; the
            selection is the same.
        train_mode: run the model in train mode (dropout on), as the paper's code does.
        selection: use this selection, for instance a loaded one, instead of running the pass.
        progress: a progress bar on the main process; by default on, for a Trainer as in its training.

    Returns:
        The selection, which prints as a short table and can be saved.

    Raises:
        ValueError: if there is no pending SAM adapter, nothing to select by, or a batch has no loss.
        FloatingPointError: if a loss or gradient is NaN or infinite.
    """
    trainer = source if isinstance(source, Trainer) else None
    model = trainer.model if trainer is not None else source
    if trainer is not None and not (dataloader is accelerator is loss_fn is None):
        raise ValueError(
            "a Trainer brings its own dataloader, accelerator and loss: call select_parameters(trainer), or pass a "
            "model in the Trainer's place."
        )
    accelerator = trainer.accelerator if trainer is not None else accelerator
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches; got {max_batches}.")
    adapter_name, config = _pending_adapter(model, adapter_name)
    if selection is None:
        candidates = candidates_of(model, adapter_name)
        if config.needs_data:
            source_of_batches = (
                from_trainer(trainer, model, count_fn)
                if trainer is not None
                else from_loader(model, dataloader, accelerator, loss_fn, count_fn)
            )
            with source_of_batches as (batches, loss), selecting(sam_layers(model).values()):
                groups = _groups(candidates, config, memory_budget)
                again = replayed(batches) if len(groups) > 1 else iter([batches])
                shown = _wants_progress(trainer, accelerator, progress)
                if shown and len(groups) > 1:
                    tqdm.write(f"memory_budget={memory_budget!r}: {len(groups)} passes over the data.")
                passes: list[GradientStatistics] = []

                def run(group: Group) -> GradientStatistics:
                    whole = len(groups) == 1
                    passes.append(
                        accumulate(
                            model,
                            {name: candidates[name] for name in group},
                            _first(next(again), max_batches),
                            loss,
                            statistics=config.statistics,
                            train_mode=train_mode,
                            probes=config.probes,
                            seed=config.seed,
                            hidden={name: call for name, call in calls.items() if name in group},
                            pieces={} if whole else group,
                            reduce=_reduction(accelerator),
                            total=_length(batches, max_batches),
                            progress=shown,
                        )
                    )
                    return passes[-1]

                calls = _linear_calls(model, adapter_name)
                if len(groups) == 1:
                    selection = choose_for(candidates, config, run(groups[0]).tensors)
                else:
                    selection = choose_by_groups(
                        candidates,
                        groups,
                        lambda group: _curved(config, run(group).tensors),
                        score=config.score,
                        density=config.density,
                        budget=config.budget,
                    )
            selection.samples, selection.batches = passes[-1].samples, passes[-1].batches
            selection.seconds = sum(one.seconds for one in passes)
        else:
            selection = choose_for(candidates, config)
    apply_selection(model, adapter_name, config, selection)
    return selection


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


def choose_for(
    candidates: Mapping[str, Tensor],
    config: SamConfig,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Selection:
    """`choose` as a config says."""
    return choose(
        candidates,
        score=config.score,
        density=config.density,
        budget=config.budget,
        seed=config.seed,
        statistics=_curved(config, statistics or {}),
    )


def _curved(config: SamConfig, statistics: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Mapping[str, Tensor]]:
    """The statistics as the score names them."""
    if "curvature" not in SCORES[config.score].inputs:
        return statistics
    source = CURVATURES[config.curvature]
    curvature = damped(statistics[source], config.damping, config.absolute_damping)
    return {"curvature": curvature, **{kind: of for kind, of in statistics.items() if kind != source}}


def _groups(candidates: Mapping[str, Tensor], config: SamConfig, memory_budget: int | str | None) -> Sequence[Group]:
    """The candidates of each pass.

    Raises:
        ValueError: if the budget is no size, or the score cannot be computed for some candidates at a time.
    """
    sizes = {name: parameter.numel() for name, parameter in candidates.items()}
    if memory_budget is None:
        return groups_within(sizes, max(1, sum(sizes.values())))
    budget = convert_file_size_to_int(memory_budget)
    widest = max(torch.promote_types(p.dtype, torch.float32).itemsize for p in candidates.values())
    entry = widest * len(config.statistics)
    if budget < entry:
        raise ValueError(f"memory_budget={memory_budget!r} does not hold the statistics of one entry, {entry} bytes.")
    groups = groups_within(sizes, budget // entry)
    if len(groups) > 1 and "curvature" in SCORES[config.score].inputs and not config.absolute_damping:
        raise ValueError(
            "damping is a share of the mean over all candidates, which one pass must see together: set "
            "absolute_damping=True, or leave out memory_budget."
        )
    return groups


def _pending_adapter(model: nn.Module, adapter_name: str | None) -> tuple[str, SamConfig]:
    """The adapter to select for.

    Raises:
        ValueError: if there is none, or it is not pending.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise ValueError(
            f"select_parameters needs a model with a SAM adapter; got a {type(model).__name__} without adapters. "
            "Make one with get_peft_model(model, SamConfig(...))."
        )
    sparse = [name for name, config in configs.items() if isinstance(config, SamConfig)]
    if adapter_name is None:
        layers = sam_layers(model).values()
        active = [name for layer in layers for name in layer.active_adapters if name in sparse]
        adapter_name = active[0] if active else "default"
    if adapter_name not in sparse:
        raise ValueError(f"there is no SAM adapter {adapter_name!r}; the model's SAM adapters are {sparse}.")
    config = configs[adapter_name]
    pending = any(delta.pending for delta in deltas_of(model, adapter_name).values())
    if config.selection is not None and pending:
        raise ValueError(
            f"adapter {adapter_name!r} was made from the config of a saved adapter and waits for its file. To load "
            "it, use PeftModel.from_pretrained; to select anew, set config.selection = None before get_peft_model."
        )
    if not pending:
        raise ValueError(
            f"the parameters of adapter {adapter_name!r} are already selected, and a SAM adapter chooses once. To "
            "choose anew, delete the adapter and add one, or start from the base model."
        )
    return adapter_name, config


def _reduction(accelerator: Accelerator | None) -> Callable[[Tensor], Tensor] | None:
    if accelerator is None or accelerator.num_processes == 1:
        return None
    return lambda tensor: accelerator.reduce(tensor, reduction="sum")


def _first(batches: Iterable[Any], number: int | None) -> Iterator[Any]:
    """The first batches; a loader draws its seed at the first of them, where the pass keeps the random states."""
    yield from itertools.islice(batches, number)


def _length(batches: Iterable[Any], max_batches: int | None) -> int | None:
    try:
        length = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a loader over an iterable dataset
        length = None
    return max_batches if length is None else min(length, max_batches or length)


def _wants_progress(trainer: Trainer | None, accelerator: Accelerator | None, progress: bool | None) -> bool:
    if accelerator is not None and not accelerator.is_main_process:
        return False
    return progress if progress is not None else trainer is None or not trainer.args.disable_tqdm
