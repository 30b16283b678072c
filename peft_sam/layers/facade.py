"""What a layer shows of the module that it wraps: the network reads and writes the module's attributes through it."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import CodeType, FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from peft_sam.layers.substitute import stand_in

# Names under which hooks, sharding and loading keep state on the very module that they are given.
STATE_OF_OTHERS = ("__", "_hf_", "_old_forward", "_is_hf_", "_fsdp", "_is_fsdp", "_ds_", "_orig_mod")

METADATA = ("dtype", "device", "shape", "ndim")

_CALL = nn.Module._call_impl.__code__


class Facade(nn.Module):
    """A module that stands in a network in the place of another, `base_layer`, and looks like it.

    Attributes that the facade's class does not declare are the other's, to read and to set. Parameters are read as
    they are stored, but from inside a forward pass as `composed` makes them, also by the module's methods: a parent may
    compute with the weight of a child without calling it.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer

    def composed(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """What a forward pass reads in place of the parameters whose names in the module are wanted.

        Dots in a name reach into children. Those that are read as they are stored are left out.
        """
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        """The module's, as `__getattr__` finds it."""
        return self._read("weight")

    @property
    def bias(self) -> Any:
        """The module's, as `__getattr__` finds it."""
        return self._read("bias")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith(STATE_OF_OTHERS):
                raise
            return self._read(name)

    def _read(self, name: str) -> Any:
        found = getattr(self.base_layer, name)
        if not isinstance(found, (Tensor, nn.Module, MethodType)) or not read_to_compute(name):
            return found
        if isinstance(found, MethodType):
            composed = self.composed(lambda _: True) if found.__self__ is self.base_layer else {}
            return MethodType(found.__func__, stand_in(self.base_layer, composed)) if composed else found
        if isinstance(found, Tensor):
            return self.composed(lambda key: key == name).get(name, found)
        inside = f"{name}."
        composed = self.composed(lambda key: key.startswith(inside))
        return stand_in(found, {key.removeprefix(inside): of for key, of in composed.items()}) if composed else found

    def __setattr__(self, name: str, value: Any) -> None:
        kind: Any = type(self)
        base = self.__dict__.get("_modules", {}).get("base_layer")
        mine = name in self.__dict__ or name.startswith(STATE_OF_OTHERS) or name in _declared(kind)
        if base is None or mine:
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)


@functools.cache
def _declared(kind: type) -> frozenset[str]:
    """The attributes that a class of facades declares, with a value or by an annotation alone."""
    ours = [of for of in kind.__mro__ if of is nn.Module or issubclass(of, Facade) or not issubclass(of, nn.Module)]
    names = (name for of in ours for name in (*vars(of), *vars(of).get("__annotations__", {})))
    return frozenset(names) - {"weight", "bias"}


def read_to_compute(name: str) -> bool:
    """Whether a parameter is read, just now, to compute with it: a module is being run, by a call or by its `forward`,
    or a checkpoint computes again what was run.

    A function that only asks for its dtype or shape, as T5's feed-forward layers do, does not.
    """
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None or asks_for_metadata_only(frame.f_code, name):
        return False
    while frame is not None:
        code = frame.f_code
        if code is _CALL or code.co_filename == checkpoint.__file__:
            return True
        if code.co_name == "forward" and code.co_varnames[:1] == ("self",):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=1024)
def asks_for_metadata_only(code: CodeType, name: str) -> bool:
    """Whether all that a function does with attributes of this name is to ask what kind of tensor they are."""
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))))
    except (OSError, SyntaxError):
        return False

    def is_read(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == name

    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if any(node.func.id == "getattr" for node in calls):  # type: ignore[attr-defined]
        return False
    asked = sum(isinstance(node, ast.Attribute) and node.attr in METADATA and is_read(node.value) for node in nodes)
    asked += sum(any(map(is_read, node.args)) for node in calls if node.func.id == "isinstance")  # type: ignore[attr-defined]
    return 0 < asked == sum(map(is_read, nodes))
