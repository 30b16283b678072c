"""Where the pass gets its batches, their losses, and over how many samples each loss is a mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    IterableDatasetShard,
    prepare_data_loader,
)
from accelerate.utils import find_batch_size, send_to_device, slice_tensors
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_sam.choosing.gradients import Loss

if TYPE_CHECKING:
    from accelerate import Accelerator

IGNORED_LABEL = -100

# Where trainers of TRL and sentence-transformers write down what `compute_loss` saw, for their next log.
RECORDS = ("_metrics", "_total_train_tokens", "accum_loss_components")


@contextmanager
def from_trainer(
    trainer: Trainer, model: nn.Module, count_fn: Callable[[Any], float] | None
) -> Iterator[tuple[Iterable[Any], Callable[[Any], Loss]]]:
    """A Trainer's train batches, and its `compute_loss` as the mean loss of a batch."""
    accelerator = trainer.accelerator
    prepared_before = list(accelerator._dataloaders)
    records = {name: copy.deepcopy(getattr(trainer, name)) for name in RECORDS if hasattr(trainer, name)}
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

    try:
        with _read_once(trainer.get_train_dataloader()) as batches:
            yield batches, loss
    finally:
        accelerator._dataloaders[:] = prepared_before
        vars(trainer).update(records)


@contextmanager
def from_loader(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    accelerator: Accelerator | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    count_fn: Callable[[Any], float] | None,
) -> Iterator[tuple[Iterable[Any], Callable[[Any], Loss]]]:
    """The batches of a loader, shared over the accelerator's processes, and `loss_fn` or the model's own loss.

    Raises:
        ValueError: here if there is no loader; by the loss if it is none, or the batch is not for the model.
    """
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

    with _read_once(dataloader) as batches:
        yield batches, loss


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
def _read_once(loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Batches in which no sample comes twice, and word to Accelerate if the loader is left early.

    Accelerate repeats samples so that all processes get as many: harmless in training, wrong in a mean over the data.
    """
    if not isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        yield loader
        return
    sampler: Any = getattr(loader, "batch_sampler", None)
    dataset = loader.dataset
    evens = isinstance(sampler, BatchSamplerShard) and sampler.even_batches
    try:
        if evens:
            sampler.even_batches = False
        if type(dataset) is IterableDatasetShard:
            dataset.__class__ = _UnpaddedShard
        yield _WithoutRepeats(loader) if isinstance(loader, DataLoaderDispatcher) else loader
    finally:
        if evens:
            sampler.even_batches = True
        if type(dataset) is _UnpaddedShard:
            dataset.__class__ = IterableDatasetShard
        loader.end()


class _UnpaddedShard(IterableDatasetShard):
    """One process's share of a stream that ends when the stream does."""

    def __iter__(self) -> Iterator[Any]:
        processes = self.num_processes
        size = self.batch_size // processes if self.split_batches else self.batch_size
        mine = range(self.process_index * size, (self.process_index + 1) * size)
        for number, element in enumerate(self.dataset):
            if number % (size * processes) in mine:
                yield element


class _WithoutRepeats:
    """The batches of a loader that sends out parts of what the first process reads."""

    def __init__(self, loader: DataLoaderDispatcher) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        for batch in loader:
            if loader.end_of_dataloader:
                size = find_batch_size(batch)
                own = max(0, min(size, loader.remainder - size * loader.state.process_index))
                if own == 0:
                    return
                batch = slice_tensors(batch, slice(0, own))
            yield batch


def replayed(batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """The batches again and again, in the same order whatever shuffles them.

    Raises:
        ValueError: if they can be read only once.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            "memory_budget asks for several passes over the data, but these batches can be read only once "
            f"({type(batches).__name__}): pass a DataLoader or a list, or a larger memory_budget."
        )
    loader: Any = batches.loader if isinstance(batches, _WithoutRepeats) else batches
    generators = {
        id(g): g for of in (loader, getattr(loader, "sampler", None)) if (g := getattr(of, "generator", None))
    }
    states = {key: generator.get_state() for key, generator in generators.items()}
    epoch = getattr(loader, "iteration", None)
    while True:
        for key, state in states.items():
            generators[key].set_state(state)
        if epoch is not None:
            loader.iteration = epoch
        yield batches


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
