"""Calling a module with other tensors in place of some of its parameters, without touching the module."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call_with(module: nn.Module, replaced: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with the parameters named in `replaced` (dots reach into children) replaced.

    The call runs on a stand-in: other threads, an exception inside and a module that calls itself all see the module
    as it is. Where none can stand in for it (while torch compiles or traces, and where somebody bound a `forward` to
    the module itself) the tensors are in the module for the time of the call.
    """
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, dict(replaced), args, kwargs, tie_weights=False)
    if "forward" in module.__dict__ or torch.jit.is_tracing():
        with _swapped(module, replaced):
            return module(*args, **kwargs)
    return stand_in(module, replaced)(*args, **kwargs)


@contextmanager
def _swapped(module: nn.Module, replaced: Mapping[str, Tensor]) -> Iterator[None]:
    places = [(module.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in replaced]
    before = [parameters[leaf] for parameters, leaf in places]
    try:
        for (parameters, leaf), tensor in zip(places, replaced.values(), strict=True):
            parameters[leaf] = tensor  # type: ignore[assignment]
        yield
    finally:
        for (parameters, leaf), parameter in zip(places, before, strict=True):
            parameters[leaf] = parameter


def stand_in(module: nn.Module, replaced: Mapping[str, Tensor]) -> nn.Module:
    """An object with the module's own `__dict__`, so that what it assigns lands on the module, but other parameters."""
    parameters, children = dict(module._parameters), dict(module._modules)
    inside: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Any] = {"_parameters": parameters, "_modules": children}
    for name, tensor in replaced.items():
        child, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(child, {})[rest] = tensor
        else:
            own[name] = parameters[name] = tensor  # type: ignore[assignment]
    for name, tensors in inside.items():
        own[name] = children[name] = stand_in(module.get_submodule(name), tensors)
    own["_compiled_call_impl"] = None  # compiled in place, a module would run itself
    if isinstance(module, nn.RNNBase):  # reads its weights from this list
        own["_flat_weights"] = [parameters.get(name) for name in module._flat_weights_names]
    kind: Any = type(module)
    found: nn.Module = object.__new__(_kind_with(kind, tuple(own)))
    object.__setattr__(found, "_sam_sparse_own", own)
    object.__setattr__(found, "__dict__", module.__dict__)
    return found


@functools.lru_cache(maxsize=1024)
def _kind_with(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of the stand-ins that have attributes of these names for themselves, beside those of their module."""

    def own(name: str) -> property:
        def put(self: Any, value: Any) -> None:
            self._sam_sparse_own[name] = value

        return property(lambda self: self._sam_sparse_own[name], put)

    members: dict[str, Any] = {name: own(name) for name in names}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ("_sam_sparse_own",)}
    made: type[nn.Module] = type(kind)(kind.__name__, (kind,), members)  # type: ignore[misc]
    return made


def is_written_down() -> bool:
    """Whether torch writes down what runs, for any input to come (jit.trace, export), instead of running it."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()
