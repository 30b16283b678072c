"""Calling a module with other tensors in place of some of its parameters, without touching the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call_with(module: nn.Module, replaced: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with the parameters named in `replaced` (dots reach into children) replaced.

    The call runs on a shallow copy that shares everything else, hooks included: other threads, an exception inside
    and a module that calls itself all see the module as it is. Where a copy cannot stand in for the module (inside
    torch.compile, and where somebody bound a `forward` to the module itself) torch.func.functional_call swaps the
    tensors for the duration of the call.
    """
    if torch.compiler.is_compiling() or "forward" in module.__dict__:
        return torch.func.functional_call(module, dict(replaced), args, kwargs, tie_weights=False)
    return _copy_with(module, replaced)(*args, **kwargs)


def _copy_with(module: nn.Module, replaced: Mapping[str, Tensor]) -> nn.Module:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_parameters"] = dict(module._parameters)
    copy.__dict__["_modules"] = dict(module._modules)
    children: dict[str, dict[str, Tensor]] = {}
    for name, tensor in replaced.items():
        child, dot, rest = name.partition(".")
        if dot:
            children.setdefault(child, {})[rest] = tensor
        else:
            copy._parameters[name] = tensor  # type: ignore[assignment]
            copy.__dict__.pop(name, None)  # FSDP1 puts views of its own there
    for child, tensors in children.items():
        copy._modules[child] = _copy_with(module.get_submodule(child), tensors)
    if isinstance(module, nn.RNNBase):  # reads its weights from this list
        copy.__dict__["_flat_weights"] = [copy._parameters.get(name) for name in module._flat_weights_names]
    return copy
