"""Reading a loader so that no sample comes twice.

Accelerate repeats samples so that all processes get as many: harmless in training, wrong in a mean over the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from accelerate.utils import find_batch_size, slice_tensors

from peft_sam.selecting.order import order_as_before


@contextmanager
def read_once(loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Batches in which no sample comes twice, and word to Accelerate if the loader is left early.

    The loader's generators and epochs are as before afterwards.
    """
    with order_as_before(loader):
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

    def __len__(self) -> int:
        return len(self.loader)

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
