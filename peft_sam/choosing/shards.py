"""Parameters of which each process holds some rows (FSDP2), their gradients, and choosing over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils.hooks import RemovableHandle

from peft_sam.choosing.processes import Processes


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is distributed over processes."""
    return isinstance(parameter, DTensor)


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def sharing(parameters: Mapping[str, Tensor]) -> Processes | None:
    """The processes that hold the parts of sharded parameters; None if none is sharded.

    Raises:
        ValueError: if a parameter is distributed in another way than by rows, or not over the same processes as the
            others.
    """
    found: dict[Any, torch.device] = {}
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            axes = [axis for axis, placement in enumerate(parameter.placements) if type(placement) is Shard]
            others = [p for axis, p in enumerate(parameter.placements) if axis not in axes]
            by_rows = len(axes) == 1 and parameter.placements[axes[0]].is_shard(0)
            if not by_rows or not all(type(p) is Replicate for p in others) or not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} is {parameter.dtype} and distributed as {parameter.placements}: only "
                    "floating-point parameters sharded by rows (FSDP2) can be selected. Select on a model that is "
                    "sharded so, or not at all, and pass the result: select_parameters(model, selection=...)."
                )
            mesh = parameter.device_mesh
            found[mesh.get_group(axes[0])] = torch.device(mesh.device_type)
    if len(found) > 1:
        raise ValueError("the candidates are sharded over several groups of processes; one is expected.")
    return next((Processes(device, group) for group, device in found.items()), None)


def start_of(parameter: Tensor) -> int:
    """The flat position in the whole parameter of the first entry that this process holds."""
    if not isinstance(parameter, DTensor):
        return 0
    axis = next(axis for axis, placement in enumerate(parameter.placements) if placement.is_shard(0))
    rows = parameter.shape[0]
    height = -(-rows // parameter.device_mesh.size(axis))
    first = min(parameter.device_mesh.get_local_rank(axis) * height, rows)
    return first * (parameter.numel() // max(rows, 1))


def sum_to_shard(whole: Tensor, parameter: DTensor) -> Tensor:
    """This process's rows of the sum of the processes' `whole` tensors."""
    mesh = parameter.device_mesh
    terms = DTensor.from_local(whole.to(mesh.device_type), mesh, [Partial()] * mesh.ndim, run_check=False)
    return terms.redistribute(placements=parameter.placements).to_local()


class WholeParameters:
    """Hooks on the whole parameters that FSDP makes of sharded ones while a module runs."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items() if is_sharded(parameter)}
        # where to find the whole parameter, and the modules whose calls make it: its own, or one that reads it
        self.places: list[tuple[nn.Module, nn.Module, str, str]] = []
        for module in model.modules():
            for owner in (module, *module.children()):
                for leaf, parameter in owner._parameters.items():
                    if id(parameter) in names:
                        self.places.append((module, owner, leaf, names[id(parameter)]))

    def listen(self, hook: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
        """Call `hook` with the name and the whole parameter when its gradient is there."""
        handles: list[RemovableHandle] = []
        seen: set[int] = set()

        def look(owner: nn.Module, leaf: str, name: str) -> Callable[..., None]:
            def before(*_: Any) -> None:
                whole = owner._parameters[leaf]
                if whole is not None and not is_sharded(whole) and whole.requires_grad and id(whole) not in seen:
                    seen.add(id(whole))
                    handles.append(whole.register_post_accumulate_grad_hook(partial(hook, name)))

            return before

        handles += [m.register_forward_pre_hook(look(owner, leaf, name)) for m, owner, leaf, name in self.places]
        return handles
