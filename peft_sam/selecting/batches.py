"""Where the pass gets its batches and their losses: from a Trainer, or from a loader and a model."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer

from peft_sam.choosing.before import random_states_as_before
from peft_sam.choosing.sums import Loss
from peft_sam.selecting.counts import Counts
from peft_sam.selecting.once import read_once

if TYPE_CHECKING:
    from accelerate import Accelerator

# A container of a Trainer with more elements is data, not a record of training.
MANY = 10_000


class Source(NamedTuple):
    """What a pass reads.

    Attributes:
        batches: as the loader gives them.
        loss: batch → its mean loss and what it counts.
        counts: knows of what the batches are counted.
        steps: so many batches will be trained on, if that is known.
    """

    batches: Iterable[Any]
    loss: Callable[[Any], Loss]
    counts: Counts
    steps: int | None = None


@contextmanager
def from_trainer(trainer: Trainer, model: nn.Module, count_fn: Callable[[Any], float] | None) -> Iterator[Source]:
    """A Trainer's train batches, prepared as in training, and its `compute_loss` as the mean loss of a batch.

    What the Trainer writes down on the way (metrics, counters, buffered generations) is as before afterwards.
    """
    accelerator, args = trainer.accelerator, trainer.args
    takes_count = bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)
    # compute_loss multiplies by this, for the average over processes that DDP takes of gradients
    factor = accelerator.num_processes if takes_count and args.average_tokens_across_devices else 1

    def compute(batch: Any, samples: float) -> tuple[Tensor, bool]:
        items = torch.tensor(samples, device=args.device) if takes_count and "labels" in batch else None
        with trainer.compute_loss_context_manager(), accelerator.autocast():
            value = trainer.compute_loss(model, batch, num_items_in_batch=items)
            _check_is_loss(value, "the Trainer's compute_loss")
            return value if items is None else value / factor, in_float16(args.device)

    def loss(batch: Any) -> Loss:
        batch = trainer._prepare_inputs(batch)
        samples = counts.of(batch)
        value, half = compute(batch, samples)
        return Loss(value, samples, half)

    counts = Counts(model, lambda batch: compute(batch, 1.0)[0], count_fn)
    steps = args.max_steps * args.gradient_accumulation_steps if args.max_steps > 0 else None
    with _trainer_as_before(trainer), random_states_as_before(), read_once(trainer.get_train_dataloader()) as batches:
        yield Source(batches, loss, counts, steps)


@contextmanager
def _trainer_as_before(trainer: Trainer) -> Iterator[None]:
    """Let a Trainer prepare and compute outside of its training."""
    prepared = list(trainer.accelerator._dataloaders)
    records = [
        (vars(owner), name, value, copy.deepcopy(value))
        for owner in (trainer, trainer.state)
        for name, value in vars(owner).items()
        if _is_record(value)
    ]
    names = set(vars(trainer))
    if not hasattr(trainer, "current_gradient_accumulation_steps"):
        trainer.current_gradient_accumulation_steps = 1  # set in training, and asked for by trainers of TRL
    try:
        yield
    finally:
        trainer.accelerator._dataloaders[:] = prepared
        for attributes, name, value, held in records:
            attributes[name] = _put_back(value, held)
        for name in set(vars(trainer)) - names:
            delattr(trainer, name)


def _is_record(value: Any) -> bool:
    """Whether this is what trainers write down of training: numbers and texts, in containers or not."""
    if isinstance(value, dict):
        return len(value) <= MANY and all(map(_is_record, value.values()))
    if isinstance(value, (list, tuple, deque, set)):
        return len(value) <= MANY and all(map(_is_record, value))
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.numel() <= MANY and not value.requires_grad
    return value is None or isinstance(value, (bool, int, float, str))


def _put_back(value: Any, held: Any) -> Any:
    """A record with what it held, the same object where it can be changed."""
    if isinstance(value, Tensor):
        return value.detach_().copy_(held) if value.shape == held.shape else held
    if isinstance(value, (dict, set)):
        value.clear()
        value.update(held)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(held)
    else:
        value = held
    return value


@contextmanager
def from_loader(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    accelerator: Accelerator | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    count_fn: Callable[[Any], float] | None,
) -> Iterator[Source]:
    """The batches of a loader, shared over the accelerator's processes, and `loss_fn` or the model's own loss.

    Raises:
        ValueError: here if there is no loader, or something else in its place; by the loss if it is none, or the batch
            is not for the model.
    """
    _check_loader(dataloader)
    assert dataloader is not None
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

    def compute(batch: Any) -> tuple[Tensor, bool]:
        with nullcontext() if accelerator is None else accelerator.autocast():
            value = _loss_of_model(model, batch) if loss_fn is None else loss_fn(model, batch)
            half = in_float16(device)
        _check_is_loss(value, "loss_fn")
        return value, half

    def loss(batch: Any) -> Loss:
        batch = send_to_device(batch, device)
        if count_fn is None:
            _check_batch(batch, loss_fn is None)
        samples = counts.of(batch)
        value, half = compute(batch)
        return Loss(value, samples, half)

    counts = Counts(model, lambda batch: compute(batch)[0], count_fn)
    with read_once(dataloader) as batches:
        yield Source(batches, loss, counts)


def _check_is_loss(value: Any, whose: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{whose} must return the mean loss of the batch as a tensor; got {type(value).__name__}.")


def in_float16(device: torch.device) -> bool:
    """Whether autocast computes in float16 here."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def _check_loader(loader: Any) -> None:
    """Whether this may give batches.

    Raises:
        ValueError: if not; says what it is instead.
    """
    if loader is None:
        raise ValueError(
            "this score needs data: call select_parameters(trainer) or select_parameters(model, dataloader)."
        )
    of_datasets = type(loader).__module__.partition(".")[0] == "datasets"
    if of_datasets or (isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)):
        raise ValueError(
            f"a {type(loader).__name__} gives rows, not batches: pass torch.utils.data.DataLoader(dataset, "
            "batch_size=..., collate_fn=...)."
        )
    if isinstance(loader, (Mapping, Tensor)) or not isinstance(loader, Iterable):
        raise ValueError(
            f"expected a DataLoader or a list of batches; got a {type(loader).__name__}. Of one batch, pass [batch]."
        )


def _check_batch(batch: Any, for_the_model: bool) -> None:
    """Whether this is a batch and not a row of a dataset.

    Raises:
        ValueError: if it is a row; says what shows it.
    """
    named = dict(batch.items()) if isinstance(batch, Mapping) else {}
    parts = named.values() if named else batch if isinstance(batch, (list, tuple)) else ()
    tensors = [part for part in parts if isinstance(part, Tensor)]
    labels = named.get("labels")
    found = None
    if named and for_the_model and not tensors:
        found = f"no tensors in {sorted(named)}"
    elif isinstance(labels, Tensor) and labels.ndim == 0:
        found = "labels without a dimension"
    elif for_the_model and isinstance(ids := named.get("input_ids"), Tensor) and ids.ndim == 1:
        found = "input_ids of one dimension"
    elif not named and {min(tensor.ndim, 1) for tensor in tensors} == {0, 1}:
        found = f"tensors of shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}"
    if found:
        raise ValueError(
            f"this is a row of a dataset and no batch: it has {found}. Pass torch.utils.data.DataLoader(dataset, "
            "batch_size=..., collate_fn=...), or, if it is a batch, count_fn to say over how many samples its loss is "
            "a mean."
        )


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
