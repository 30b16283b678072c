"""Which batches a loader gives, and putting back what decides it: generators, epochs, workers."""

from __future__ import annotations

import copy
import functools
import random
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

# How modules of torch, Accelerate and datasets call the number of times that they were read.
EPOCHS = ("epoch", "iteration", "_epoch")
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Containers with more elements hold data; a loader with more parts is not looked through to its end.
MANY, PARTS = 200, 10_000


class Order:
    """What decides which batches a loader gives, as it is now: of the loader and all that it is made of."""

    def __init__(self, loader: Any) -> None:
        self._ways_back = [way for part in _parts_of(loader) for way in _ways_back(part)]

    def put_back(self) -> None:
        """Have the loader give the batches that it would have given."""
        for way in self._ways_back:
            way()


@contextmanager
def order_as_before(loader: Any) -> Iterator[None]:
    """Read from a loader inside; its order is as before afterwards."""
    order = Order(loader)
    try:
        yield
    finally:
        order.put_back()


def replayed(batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """The batches again and again, the same each time whatever shuffles them.

    Raises:
        ValueError: if they can be read only once; while they are read, if they are others than the first time.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            "memory_budget asks for several passes over the data, but these batches can be read only once "
            f"({type(batches).__name__}): pass a DataLoader or a list, or a larger memory_budget."
        )
    order, first = Order(batches), list[int]()
    yield _noted(batches, first)
    while True:
        order.put_back()
        yield _compared(batches, first)


def _noted(batches: Iterable[Any], into: list[int]) -> Iterator[Any]:
    for batch in batches:
        into.append(digest(batch))
        yield batch


def _compared(batches: Iterable[Any], first: list[int]) -> Iterator[Any]:
    number = 0
    for number, batch in enumerate(batches, 1):
        if number > len(first) or digest(batch) != first[number - 1]:
            break
        yield batch
    else:
        if number == len(first):
            return
    raise ValueError(
        f"batch {max(number - 1, 0)} is not the one that the first pass read there: memory_budget asks for several "
        "passes over the same data. Pass a list of batches, or a larger memory_budget, for one pass."
    )


def digest(batch: Any, above: tuple[int, ...] = ()) -> int:
    """A checksum of the tensors, arrays, numbers and texts in a batch, which is in objects with the ids `above`."""
    if isinstance(batch, Tensor):
        bits = batch.detach().cpu().contiguous().view(-1).view(torch.uint8) if batch.numel() else torch.empty(0)
        return zlib.crc32(bits.numpy().tobytes(), zlib.crc32(repr(tuple(batch.shape)).encode()))
    if isinstance(batch, np.ndarray) and batch.dtype != object:
        return zlib.crc32(batch.tobytes(), zlib.crc32(repr((batch.shape, batch.dtype)).encode()))
    if isinstance(batch, (str, bytes, int, float, type(None))):
        return zlib.crc32(repr(batch).encode())
    if hasattr(batch, "items"):
        parts = batch.items()
    else:
        parts = batch if isinstance(batch, (list, tuple, np.ndarray)) else getattr(batch, "__dict__", {}).items()
    found = 0
    for part in parts if id(batch) not in above else ():
        found = zlib.crc32(digest(part, (*above, id(batch))).to_bytes(4, "little"), found)
    return found


def _parts_of(loader: Any) -> Iterator[Any]:
    """The objects that a loader is made of: samplers, datasets, collators, transforms, and what these hold."""
    left, seen = [loader], dict[int, Any]()
    while left and len(seen) < PARTS:
        part = left.pop()
        if id(part) not in seen and not isinstance(part, (Tensor, np.ndarray, str, bytes, type, types.ModuleType)):
            seen[id(part)] = part
            yield part
            left.extend(_inside(part))


def _inside(part: Any) -> Iterable[Any]:
    if isinstance(part, dict):
        return part.values() if len(part) <= MANY else ()
    if isinstance(part, (list, tuple, set)):
        return part if len(part) <= MANY else ()
    if isinstance(part, functools.partial):
        return (part.func, *part.args, *part.keywords.values())
    if isinstance(part, types.MethodType):
        return (part.__self__, part.__func__)
    if isinstance(part, types.FunctionType):
        shared = (part.__globals__.get(name) for name in part.__code__.co_names)
        enclosed = (_content(cell) for cell in part.__closure__ or ())
        given = (part.__defaults__ or (), part.__kwdefaults__ or {})
        return [*given, *enclosed, *(value for value in shared if isinstance(value, GENERATORS))]
    if isinstance(part, nn.Module) and next(part.parameters(), None) is not None:
        return ()  # a model
    methods = [of for kind in type(part).__mro__ for of in vars(kind).values() if isinstance(of, types.FunctionType)]
    return [*methods, *(value for name, value in getattr(part, "__dict__", {}).items() if name != "_iterator")]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _ways_back(part: Any) -> Iterator[Callable[[], Any]]:
    """What puts one part back."""
    if isinstance(part, torch.Generator):
        yield functools.partial(part.set_state, part.get_state())
    elif isinstance(part, np.random.Generator):
        yield functools.partial(setattr, part.bit_generator, "state", copy.deepcopy(part.bit_generator.state))
    elif isinstance(part, np.random.RandomState):
        yield functools.partial(part.set_state, part.get_state())
    elif isinstance(part, random.Random):
        yield functools.partial(part.setstate, part.getstate())
    elif isinstance(part, (DataLoader, Sampler, Dataset)):
        for name in EPOCHS:
            if type(number := vars(part).get(name)) is int:
                yield functools.partial(setattr, part, name, number)
        if isinstance(part, DataLoader) and part.__dict__.get("_iterator", part) is None:
            yield functools.partial(
                setattr, part, "_iterator", None
            )  # workers that stay have random states of their own
