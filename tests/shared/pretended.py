"""A pretended GPU: tensors that say they are on one and are computed on the CPU, to see what a GPU would be asked.

Under `pretended_gpu()` "cuda" is a device. What is moved to it or made on it, and all that is computed from that, says
that it is there. An operation between here and there is the error that it would be, and what makes the host wait for
the device is written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, HERE = torch.device("cuda", 0), torch.device("cpu")
# Operations whose result the host needs before it goes on.
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "bincount", "equal", "masked_select"}
# Operations that take positions from the host, too.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MOVING = (Tensor.to, Tensor.cpu, Tensor.cuda)
# Functions that name a device and make nothing on it.
NAMING = (torch.device, torch.get_device_module, torch._C._nn._parse_to)


class Gpu:
    """What is on the device, and what made the host wait for it.

    Attributes:
        waits: the operations, in their order.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._storages: dict[int, Any] = {}  # kept, so that no other gets the address of one that is freed
        self.moving = False

    def has(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages

    def take(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def leave(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided:
            self._storages.pop(tensor.untyped_storage()._cdata, None)

    def wait(self, what: str) -> None:
        self.waits.append(what)


class _Operations(TorchDispatchMode):
    """Where the operands of each operation are, and so its results."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name.partition("::")[2]
        found = operation(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in operands if self.gpu.has(tensor)]
        if not there or self.gpu.moving:
            return found
        if name == "copy_":
            if not self.gpu.has(operands[0]):
                self.gpu.wait(name)
            return found
        here = [tensor for tensor in operands if tensor.ndim and not self.gpu.has(tensor)]
        if here and not (name in INDEXING and self.gpu.has(operands[0])):
            raise RuntimeError(f"{operation} has operands on the GPU, {shapes(there)}, and here, {shapes(here)}")
        if name in WAITING or (name in INDEXING and any(t.dtype == torch.bool for t in operands[1:])):
            self.gpu.wait(name)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.gpu.take(tensor)
        return found


def shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


class _Python(TorchFunctionMode):
    """What Python code sees and asks of the device."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = bool(args) and isinstance(args[0], Tensor) and self.gpu.has(args[0])
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if mine else function(*args)
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return mine
        if function in (Tensor.numpy, Tensor.__array__) and mine:
            raise TypeError("a tensor on the GPU has no numpy array")
        if function is Tensor.tolist and mine:
            self.gpu.wait("tolist")
        if function in (Tensor.backward, torch.autograd.grad):  # run Python code, which is to see the device too
            with self:
                return (backward if function is Tensor.backward else grad)(*args, **kwargs)
        if function in NAMING:
            return function(*args, **kwargs)
        asked = [leaf for leaf in tree_leaves((args, kwargs)) if is_gpu(leaf)]
        args, kwargs = tree_map(lambda leaf: HERE if is_gpu(leaf) else leaf, (args, kwargs))
        if function in MOVING:
            return self._move(function, args, kwargs, mine, bool(asked))
        found = function(*args, **kwargs)
        copied = function is Tensor.__deepcopy__ and mine
        if isinstance(found, Tensor) and (asked or copied or kwargs.get("device") is not None):
            (self.gpu.take if asked or copied else self.gpu.leave)(found)
        return found

    def _move(self, function: Any, args: Any, kwargs: Any, mine: bool, asked: bool) -> Tensor:
        like = next((arg for arg in args[1:] if isinstance(arg, Tensor)), None)
        named = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, (str, torch.device))]
        if function is Tensor.cuda or asked or (like is not None and self.gpu.has(like)):
            wanted = True
        elif function is Tensor.cpu or named or like is not None:
            wanted = False
        else:
            wanted = mine
        if function is Tensor.cuda:
            function, args, kwargs = Tensor.to, (args[0], HERE), {}
        found: Tensor = function(*args, **kwargs)
        if wanted == mine:
            return found
        if mine:
            self.gpu.wait("to the host")
        self.gpu.moving = True
        found = found.clone()
        self.gpu.moving = False
        if wanted:
            self.gpu.take(found)
        return found


def backward(
    of: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False, inputs: Any = None
) -> None:
    """`Tensor.backward` without its look at who else wants to do it."""
    run((of,), (gradient,), retain_graph, create_graph, tuple(inputs or ()), accumulate_grad=True)


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    allow_unused: bool = False,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, likewise."""
    outputs, inputs, gradients = (tree_leaves(given) for given in (outputs, inputs, grad_outputs))
    gradients = gradients if grad_outputs is not None else [None] * len(outputs)
    found = run(tuple(outputs), tuple(gradients), retain_graph, create_graph, tuple(inputs), accumulate_grad=False)
    if not allow_unused and any(gradient is None for gradient in found):
        raise RuntimeError("an input was not used")
    return found


def run(of: Any, gradients: Any, retain: bool | None, create: bool, into: Any, accumulate_grad: bool) -> Any:
    gradients = tuple(torch.ones_like(o) if g is None else g for o, g in zip(of, gradients, strict=True))
    keep = create if retain is None else retain
    return _engine_run_backward(of, gradients, keep, create, into, True, accumulate_grad=accumulate_grad)


def is_gpu(leaf: Any) -> bool:
    return (isinstance(leaf, torch.device) and leaf.type == "cuda") or (isinstance(leaf, str) and leaf[:4] == "cuda")


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    with _Operations(gpu), _Python(gpu):
        yield gpu
