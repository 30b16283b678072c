"""`select_parameters`: the stairs between choosing and adapting.

Takes a Trainer, or a model and batches; runs the pass over the data; chooses; gives the adapter its support.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_sam.checkpoint import sam_layers
from peft_sam.choosing import choose
from peft_sam.config import SamConfig
from peft_sam.gradients import Loss, accumulate
from peft_sam.layer import selecting
from peft_sam.model import apply_selection, candidates_of, deltas_of
from peft_sam.scores import SCORES
from peft_sam.selection import Selection

if TYPE_CHECKING:
    from accelerate import Accelerator

IGNORED_LABEL = -100


def select_parameters(
    source: Trainer | nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    accelerator: Accelerator | None = None,
    adapter_name: str | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    count_fn: Callable[[Any], float] | None = None,
    max_batches: int | None = None,
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
        candidates = candidates_of(model, adapter_name, config.score)
        found = None
        if needed := SCORES[config.score].statistics:
            source_of_batches = (
                _from_trainer(trainer, model, count_fn)
                if trainer is not None
                else _from_loader(model, dataloader, accelerator, loss_fn, count_fn)
            )
            with source_of_batches as (batches, loss), selecting(sam_layers(model).values()):
                found = accumulate(
                    model,
                    candidates,
                    itertools.islice(batches, max_batches),
                    loss,
                    statistics=needed,
                    train_mode=train_mode,
                    reduce=_reduction(accelerator),
                    total=_length(batches, max_batches),
                    progress=_wants_progress(trainer, accelerator, progress),
                )
        selection = choose_for(candidates, config, found.tensors if found else None)
        if found:
            selection.samples, selection.batches, selection.seconds = found.samples, found.batches, found.seconds
    apply_selection(model, adapter_name, config, selection)
    return selection


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
        statistics=statistics,
    )


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


# Batches and their loss


@contextmanager
def _from_trainer(
    trainer: Trainer, model: nn.Module, count_fn: Callable[[Any], float] | None
) -> Iterator[tuple[Iterable[Any], Callable[[Any], Loss]]]:
    accelerator = trainer.accelerator
    prepared_before = list(accelerator._dataloaders)
    takes_count = bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)
    # compute_loss multiplies by this, for the average over processes that DDP takes of gradients
    factor = accelerator.num_processes if takes_count and trainer.args.average_tokens_across_devices else 1

    def loss(batch: Any) -> Loss:
        batch = send_to_device(batch, trainer.args.device)
        samples = _count(model, batch) if count_fn is None else count_fn(batch)
        items = torch.tensor(samples, device=trainer.args.device) if takes_count and "labels" in batch else None
        with trainer.compute_loss_context_manager(), accelerator.autocast():
            value = trainer.compute_loss(model, batch, num_items_in_batch=items)
        return Loss(value if items is None else value / factor, samples)

    loader = trainer.get_train_dataloader()
    try:
        with _ended(loader):
            yield loader, loss
    finally:
        accelerator._dataloaders[:] = prepared_before


@contextmanager
def _from_loader(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    accelerator: Accelerator | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    count_fn: Callable[[Any], float] | None,
) -> Iterator[tuple[Iterable[Any], Callable[[Any], Loss]]]:
    if dataloader is None:
        raise ValueError(
            "this score needs data: call select_parameters(trainer) or select_parameters(model, dataloader)."
        )
    device = next(model.parameters()).device
    if accelerator is not None:
        device = accelerator.device
        if isinstance(dataloader, DataLoader) and not isinstance(dataloader, (DataLoaderShard, DataLoaderDispatcher)):
            dataloader = prepare_data_loader(
                dataloader,
                device,
                num_processes=accelerator.num_processes,
                process_index=accelerator.process_index,
                put_on_device=True,
            )

    def loss(batch: Any) -> Loss:
        batch = send_to_device(batch, device)
        with nullcontext() if accelerator is None else accelerator.autocast():
            value = _loss_of_model(model, batch) if loss_fn is None else loss_fn(model, batch)
        if not isinstance(value, Tensor):
            raise ValueError(f"loss_fn must return the mean loss of the batch as a tensor; got {type(value).__name__}.")
        return Loss(value, _count(model, batch) if count_fn is None else count_fn(batch))

    with _ended(dataloader):
        yield dataloader, loss


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, which is not a dict of the model's arguments: pass "
            "loss_fn=lambda model, batch: ... to say how the loss is computed."
        )
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(
            f"the model returned no loss for a batch with {sorted(batch)}: put 'labels' in the batches, or pass "
            "loss_fn=lambda model, batch: ... to say how the loss is computed."
        )
    return loss


@contextmanager
def _ended(loader: Iterable[Any]) -> Iterator[None]:
    """Tell Accelerate that a loader which was left early is no longer being iterated."""
    try:
        yield
    finally:
        if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
            loader.end()


def _count(model: nn.Module, batch: Any) -> float:
    """Over how many samples the loss of a batch is a mean: its target tokens if it has token labels, else examples."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
        elif _shifts_labels(model):
            labels = labels[..., 1:]
        return int((labels != IGNORED_LABEL).sum())
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    lengths = [len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim]
    return lengths[0] if lengths else 1


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares position i with label i + 1."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _reduction(accelerator: Accelerator | None) -> Callable[[Tensor], Tensor] | None:
    if accelerator is None or accelerator.num_processes == 1:
        return None
    return lambda tensor: accelerator.reduce(tensor, reduction="sum")


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
