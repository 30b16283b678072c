"""Everything as before: what a pass over data changes on its way, put back bit for bit.

Flags, modes and gradients of the model; the buffers of every module that runs, as running statistics are; the gradients
of whatever else the loss reaches; random states.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_pre_hook

from peft_sam.choosing.shards import local


@contextmanager
def as_before(
    model: nn.Module, parameters: Mapping[str, Tensor], train_mode: bool, read_only: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Give only `parameters` gradients and set the mode; put everything back at the end.

    Args:
        read_only: modules whose buffers are only read, and may be large: quantised layers.
    """
    wanted = {id(parameter) for parameter in parameters.values()}
    everything = {id(p): p for p in (*model.parameters(), *parameters.values())}.values()
    flags = [(parameter, parameter.requires_grad) for parameter in everything]
    grads = [(parameter, parameter.grad) for parameter in parameters.values()]
    modes = [(module, module.training) for module in model.modules()]
    with random_states_as_before(), _buffers_as_before(model, read_only):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in wanted)
            for parameter, _ in grads:
                parameter.grad = None
            model.train(train_mode)
            yield
        except BaseException:
            root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
            if root is not None:
                root.reset_iter_state()  # torch's way out of an interrupted pass
            raise
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, grad in grads:
                parameter.grad = grad
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def random_states_as_before() -> Iterator[None]:
    """Python's, numpy's and torch's."""
    put_back = remember_random_states()
    try:
        yield
    finally:
        put_back()


def remember_random_states() -> Callable[[], None]:
    """What puts Python's, numpy's and torch's random states back to what they are now."""
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return put_back


@contextmanager
def _buffers_as_before(model: nn.Module, read_only: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the buffers of the model, and of each other module as it is first called: a loss may have some, too."""
    passed_over = set(map(id, read_only))
    kept = {id(module): _Kept(module) for module in model.modules() if id(module) not in passed_over}

    def look(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or id(module) in kept or id(module) in passed_over:
            return
        for inside in module.modules():
            if inside._buffers and id(inside) not in kept:
                kept[id(inside)] = _Kept(inside)

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
        for one in kept.values():
            one.put_back()


class _Kept:
    """The buffers that a module had, and what they held."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, dict(module._buffers)
        self.held = [(b, b.detach().clone()) for b in self.own.values() if b is not None and not b.is_meta]
        # what a module counts beside its buffers, as how far a table of positions reaches
        self.plain = {
            name: value for name, value in vars(module).items() if value is None or type(value) in (bool, int, float)
        }

    def put_back(self) -> None:
        """All of it, as it was."""
        now = self.module._buffers
        if now.keys() != self.own.keys() or any(now[name] is not buffer for name, buffer in self.own.items()):
            now.clear()
            now.update(self.own)
            vars(self.module).update(self.plain)
        with torch.no_grad():
            for buffer, before in self.held:
                if not _same_bits(local(buffer), local(before)):
                    buffer.copy_(before)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors hold the same: torch counts no version of running statistics, and a changed one costs plans."""
    try:
        return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    except RuntimeError:  # a layout that has no bytes to look at
        return False


@contextmanager
def others_as_before(loss: Tensor, wanted: Container[int]) -> Iterator[None]:
    """Run a loss backward inside: leaves that it reaches keep the gradients they had, but for those `wanted` by id."""
    others = [(leaf, leaf.grad) for leaf in _leaves(loss) if id(leaf) not in wanted]
    for leaf, _ in others:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in others:
            leaf.grad = grad


def passes_by(loss: Tensor, kind: str) -> bool:
    """Whether a loss's gradient passes a node of this kind."""
    return any(type(node).__name__ == kind for node in _nodes(loss))


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a loss's gradient reaches."""
    for node in _nodes(loss):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable


def _nodes(loss: Tensor) -> Iterator[Any]:
    """What a loss's gradient passes."""
    found: list[Any] = [loss.grad_fn]
    seen = set(found)
    while found:
        node = found.pop()
        yield node
        for below, _ in getattr(node, "next_functions", ()):
            if below is not None and below not in seen:
                seen.add(below)
                found.append(below)
