"""`select_parameters`: the stairs between choosing and adapting.

Takes a Trainer, or a model and batches; runs the pass over the data; chooses; gives the adapter its support.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from peft_sam.choosing.choose import choose, entries_asked_for
from peft_sam.choosing.dense import copy_whole, restoring, train_densely
from peft_sam.choosing.processes import Processes
from peft_sam.config import SamConfig
from peft_sam.layers.base import selecting
from peft_sam.layers.found import adapted_part, deltas_of, sam_layers
from peft_sam.recorded import shown
from peft_sam.selecting.adapter import pending_adapter
from peft_sam.selecting.batches import from_loader, from_trainer
from peft_sam.selecting.exclude import Excluded, excluded
from peft_sam.selecting.passes import select_by_data
from peft_sam.selecting.rates import RateCheck
from peft_sam.selecting.taken import check_not_taken
from peft_sam.selecting.twin import sharded_twin
from peft_sam.selection import Selection
from peft_sam.tuner.candidates import apply_selection, candidates_of, trained_besides

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
    memory_budget: float | str | None = None,
    train_mode: bool = False,
    head_warmup_steps: int = 0,
    head_warmup_lr: float = 1e-3,
    selection: Selection | None = None,
    exclude: Excluded | Iterable[Excluded] | None = None,
    progress: bool | None = None,
) -> Selection:
    """Choose the parameters that a pending SAM adapter trains. Once, before training.

    Runs the loss forward and backward over the data, with every random state, buffer, mode, gradient and flag put back
    afterwards, and selects the ⌊p·m⌋ entries with the largest score; for the default score, the entries where the
    gradient of the mean loss is largest.

    Args:
        source: a `transformers.Trainer` (its train dataloader, collator, `compute_loss`, device and precision are
            used), or a model with a SAM adapter together with `dataloader`. The adapter may be in a part of the model,
            as in a SentenceTransformer.
        dataloader: batches, with a model. Dicts of tensors that the model takes, unless `loss_fn` is given.
        accelerator: an `accelerate.Accelerator`, to share the batches of a DataLoader over processes and for its
            precision. Without one, or of a list, each process passes over the batches that it brings itself. All
            processes that torch.distributed knows must call this, with the same model: they share the selection.
        adapter_name: which adapter; the active one by default.
        loss_fn: (model, batch) → mean loss of the batch, with a model. By default `model(**batch).loss`.
        count_fn: batch → over how many samples its loss is a mean, which weights batches of unequal size. By
            default the number of target tokens where `labels` are token labels, else the number of examples.
        max_batches: stop after so many batches; None for all of them, or, of a loader that cannot say how many it has,
            for the first 1,000 at most. Of the score "movement": the number of steps.
        memory_budget: for the statistics, in bytes or as "8GiB"; None for what one pass needs, a float32 number per
            candidate entry and statistic. With less, the pass is repeated for some candidates at a time; the
            selection is the same, but by Hutchinson's curvature, which is estimated for some candidates at a time.
        train_mode: run the model in train mode (dropout on), as the paper's code does.
        head_warmup_steps: first train what is trained besides the adapter, as the new head in `modules_to_save`, alone
            for so many batches (of each process), and keep it so: the gradient under a random head tells of the head's
            noise, too. With AdamW without weight decay, in train mode.
        head_warmup_lr: learning rate of that, which falls linearly to zero.
        selection: use this selection, for instance a loaded one, instead of running the pass.
        exclude: entries to leave alone: those of other adapters of the model, by name, or of other selections, so that
            adapters can be added up and disturb each other less.
        progress: a progress bar on the main process; by default on, for a Trainer as in its training.

    Returns:
        The selection, which prints as a short table and can be saved.

    An optimizer that was made before trains the selected entries as one that is made after.

    Raises:
        ValueError: if there is no pending SAM adapter, nothing to select by, a batch has no loss, a head is to be
            warmed up and there is none, or something was prepared before that would not train the selected entries
            (DistributedDataParallel, DeepSpeed, FSDP2's optimizer, an optimizer without the adapter's values). The
            model is as before, also after an interruption.
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
    if max_batches is not None and not (_is_whole(max_batches) and max_batches >= 1):
        raise ValueError(f"max_batches must be an integer of at least 1, or None for all batches; got {max_batches!r}.")
    if trainer is not None and trainer.model_init is not None:
        raise ValueError(
            "a Trainer with model_init calls it again when it trains, and what was selected for this model is lost: "
            "select inside model_init, with the model and a dataloader, or pass the Trainer a model."
        )
    if selection is not None and not isinstance(selection, Selection):
        raise ValueError(
            f"selection must be a Selection, as Selection.load(path) reads one from a file; got {shown(selection)}."
        )
    adapted = adapted_part(model)
    adapter_name, config = pending_adapter(adapted, adapter_name)
    check_not_taken(model, adapted, adapter_name, trainer, accelerator)
    head = _head_to_warm(model, head_warmup_steps, head_warmup_lr)
    by_data = selection is None and config.needs_data
    if selection is not None and exclude is not None:
        raise ValueError("selection says which entries are selected, and exclude which are not: pass one of them.")
    left_alone = excluded(adapted, candidates_of(adapted, adapter_name), exclude)
    with restoring(head.values(), only_on_error=True):
        if head or by_data:
            passing, processes = sharded_twin(model, accelerator), _processes(model, accelerator)
            if processes is not None:
                shapes = {name: tuple(p.shape) for name, p in candidates_of(adapted, adapter_name).items()}
                processes.check_alike("candidates", shapes)
            visible = _wants_progress(trainer, processes, progress)
            source_of_batches = (
                from_trainer(trainer, passing, count_fn)
                if trainer is not None
                else from_loader(passing, dataloader, accelerator, loss_fn, count_fn)
            )
            with source_of_batches as read, selecting(sam_layers(passing).values()):
                if head:
                    its_head = trained_besides(passing)
                    train_densely(
                        passing,
                        its_head,
                        read.batches,
                        read.loss,
                        what="Head warm-up",
                        steps=head_warmup_steps,
                        lr=head_warmup_lr,
                        processes=processes,
                        progress=visible,
                    )
                    copy_whole(its_head, head)
                if by_data:
                    selection = select_by_data(
                        passing,
                        adapted_part(passing),
                        adapter_name,
                        config,
                        read,
                        max_batches=max_batches,
                        memory_budget=memory_budget,
                        train_mode=train_mode,
                        processes=processes,
                        progress=visible,
                        exclude=left_alone,
                    )
                    selection.head_warmup_steps = int(head_warmup_steps)
                    tell_if_fewer(selection)
        if selection is None:
            selection = choose_for(candidates_of(adapted, adapter_name), config, left_alone)
        apply_selection(adapted, adapter_name, config, selection)
    if trainer is not None:
        values = (delta.values for delta in deltas_of(adapted, adapter_name).values())
        trainer.add_callback(RateCheck(values, selection.share))  # an optimizer may be made until training begins
    return selection


def choose_for(
    candidates: Mapping[str, Tensor], config: SamConfig, exclude: Mapping[str, Tensor] | None = None
) -> Selection:
    """`choose` as a config says, for a score that needs no data."""
    found = choose(
        candidates,
        score=config.score,
        density=config.density,
        budget=config.budget,
        seed=config.seed,
        exclude=exclude,
    )
    tell_if_fewer(found)
    return found


class FewerEntriesWarning(UserWarning):
    """Fewer entries than the density asks for can be trained, and only these are selected."""


def tell_if_fewer(selection: Selection) -> None:
    """Warn if fewer entries were selected than the density asks for.

    Raises:
        ValueError: if none was.
    """
    sizes = [shape.numel() for shape in selection.shapes.values()]
    asked = entries_asked_for(sizes, selection.density, selection.budget)
    if selection.k >= asked:
        return
    free = " and are not excluded" if selection.excluded else ""
    have = f"have a {'gradient in the pass' if selection.batches else 'score that is a number'}{free}"
    text = f"density {selection.density:g} asks for {asked:,} entries, and only {selection.k:,} candidates {have}"
    if not selection.k:
        raise ValueError(f"{text}: nothing would be trained.")
    ways = (
        " The others would not be trained, or only by data that the pass did not see: let it see more (max_batches), "
        "leave what the loss does not reach out of target_modules, or ask for a lower density."
    )
    warnings.warn(f"{text}: these were selected.{ways if selection.batches else ''}", FewerEntriesWarning, stacklevel=3)


def _head_to_warm(model: nn.Module, steps: int, lr: float) -> dict[str, nn.Parameter]:
    """What is trained besides the adapter, by name; nothing if it is not to be warmed up.

    Raises:
        ValueError: if it is, and there is none, or the numbers make no sense.
    """
    if not (_is_whole(steps) and steps >= 0 and isinstance(lr, (int, float)) and lr > 0):
        raise ValueError(
            "head_warmup_steps must be an integer of at least 0 and head_warmup_lr a number above 0; got "
            f"{steps!r} and {lr!r}."
        )
    head = trained_besides(model) if steps else {}
    if steps and not head:
        raise ValueError(
            f"head_warmup_steps={steps} trains a new head before the pass, and nothing is trained besides the adapter. "
            "If the model has no new head, as a language model whose head is pretrained, leave it out: "
            "select_parameters(trainer). If it has one, name it in SamConfig(modules_to_save=[...]), or give the "
            "task_type, by which PEFT finds it."
        )
    return head


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _processes(model: nn.Module, accelerator: Accelerator | None) -> Processes | None:
    """Those that share the pass: all that there are, whether Accelerate or only torch.distributed knows of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return Processes(next(model.parameters()).device if accelerator is None else accelerator.device)


def _wants_progress(trainer: Trainer | None, processes: Processes | None, progress: bool | None) -> bool:
    if processes is not None and processes.rank:
        return False
    return progress if progress is not None else trainer is None or not trainer.args.disable_tqdm
