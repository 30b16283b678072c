"""The processes that share a pass: sums over them, and errors that reach all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

# Under this key and its rank a process says in the store of its group how far it is.
KEY = "peft_sam pass"
WAITS = "waiting"
# Seconds for the others to notice, too, that somebody is lost.
GRACE = 1.0


class LostProcessError(RuntimeError):
    """Another process died, hung or left while this one waited for it."""


class Processes:
    """The processes of a group of `torch.distributed`, by default all.

    Attributes:
        rank, number: of this process; of all.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device, self.group = device, group
        self.rank, self.number = dist.get_rank(group), dist.get_world_size(group)

    def at(self, place: str) -> None:
        """Leave word for the others of how far this process is, in case it is lost."""
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{KEY} {dist.get_rank()}", place)

    def _where(self) -> str:
        """How far those processes are that do not wait for others themselves."""
        store = dist.distributed_c10d._get_default_store()
        self.at(WAITS)
        time.sleep(GRACE)
        found = []
        for number in range(dist.get_world_size()):
            if store.check([f"{KEY} {number}"]) and (place := store.get(f"{KEY} {number}").decode()) != WAITS:
                found.append(f"process {number}, last seen at {place}")
        return "; ".join(found) or "unknown which"

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, where the tensor was; `tensor` itself may become it."""
        total = tensor.to(self.device)
        with self._present():
            dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def each(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, on the CPU; shapes may differ in the first dimension."""
        rest = tensor.shape[1:]
        found = []
        for source, length in enumerate(self.objects(len(tensor))):
            part = tensor.to(self.device) if source == self.rank else torch.empty((length, *rest), dtype=tensor.dtype)
            found.append(self._sent(part.to(self.device).contiguous(), source).cpu())
        return found

    def objects(self, mine: Any) -> list[Any]:
        """Small Python objects of all processes."""
        found: list[Any] = [None] * self.number
        with self._present():
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def _sent(self, tensor: Tensor, source: int) -> Tensor:
        if len(tensor):
            with self._present():
                dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    @contextmanager
    def together(self, rest: Iterable[Any] = ()) -> Iterator[None]:
        """Run something on every process; an error on one is raised on all.

        Args:
            rest: read to its end after an error, because the others may wait in it for this process's part.

        Raises:
            Exception: the error of this process, or a `RuntimeError` that says what happened to which other.
        """
        error: Exception | None = None
        try:
            yield
        except LostProcessError:
            raise
        except Exception as found:
            error = found
            logger.error("process %d waits for the others to end: %s: %s", self.rank, type(found).__name__, found)
            with suppress(Exception):
                for _ in rest:
                    pass
        if int(self.sum(torch.tensor([int(error is not None)]))):
            messages = self.objects(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            number = next(number for number, message in enumerate(messages) if message)
            raise RuntimeError(f"process {number} failed, and nothing was selected: {messages[number]}")

    def in_step(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Batches and whether they count; as many on every process.

        On a sharded model every process takes part in every pass. One that has no batch left takes its last once
        more, or, if it never had one, that of another process; such a batch does not count.
        """
        own, last = iter(batches), None
        while True:
            with self.together():
                batch = next(own, None)
            lacking = self.objects((batch is not None, last is not None or batch is not None))
            if not any(has for has, _ in lacking):
                return
            if not all(had for _, had in lacking):
                source = next(number for number, (has, _) in enumerate(lacking) if has)
                sent = [batch]
                with self._present():
                    dist.broadcast_object_list(sent, group=self.group, group_src=source)
                last = sent[0] if last is None else last
            yield (last, False) if batch is None else (batch, True)
            last = last if batch is None else batch

    def check_alike(self, what: str, mine: Any) -> None:
        """Whether all processes bring the same.

        Raises:
            ValueError: on all, if not.
        """
        if len(set(self.objects(repr(mine)))) > 1:
            raise ValueError(
                f"the processes of torch.distributed share a selection, and have different {what}: each must bring the "
                "same model with the same adapter, and a part of the data."
            )

    @contextmanager
    def _present(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            try:
                lost = self._where()
            except RuntimeError:  # the store was the lost process's
                lost = "unknown which"
            raise LostProcessError(
                f"process {self.rank} lost another process during the pass ({lost}); nothing was selected. All must "
                "select: look for the first error in the output of the others. If one is only slow, raise the timeout "
                "of the process group (accelerate.InitProcessGroupKwargs)."
            ) from error
