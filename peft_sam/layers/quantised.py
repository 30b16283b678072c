"""Reading a quantised weight and writing it back, through PEFT's backends; the original codes are kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_sam._peft import QuantizationBackend
from peft_sam.layers.owned import packed_weight

# Attributes in which the quantisers' layers keep scales and codes beside their weight, where they have them.
BESIDE_THE_WEIGHT = ("quant_state", "state", "meta")


class Codes(NamedTuple):
    """A quantised weight as its layer holds it.

    Attributes:
        name: of the parameter in the layer.
        parameter: the weight itself.
        attributes: of the parameter; quantisers keep scales there, too.
        beside: attributes of the layer that belong to the weight.
    """

    name: str
    parameter: nn.Parameter
    attributes: Mapping[str, Any]
    beside: Mapping[str, Any]


class _Door:
    """What PEFT's backends write through: they may put a new module in the place of the base layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def dequantised(module: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The numbers that a quantised weight stands for, (outputs × inputs), as a tensor of its own."""
    return backend.get_base_weight(_readable(module)).detach().clone()


def requantise(module: nn.Module, backend: QuantizationBackend, weight: Tensor) -> Codes:
    """Write `weight`, rounded to the quantiser's codes, and return what was there."""
    warnings.warn(
        f"Merging into a quantised weight ({backend.backend_name}) rounds it to the quantiser's codes: outputs may "
        "differ from those of the unmerged adapter. Unmerging is exact.",
        stacklevel=2,
    )
    codes, door = _codes(module), _Door(module)
    vars(module).update(
        {key: copy.copy(value) for key, value in codes.beside.items()}
    )  # backends change these in place
    backend.set_base_weight(door, weight)
    new = door.base_layer
    if new is not module:  # hooks and the bias stay with the module that is there
        _write(module, _codes(new))
    return codes


def put_back(module: nn.Module, codes: Codes) -> None:
    """Write what `requantise` returned; the layer may have moved since."""
    device = module.get_parameter(codes.name).device
    _write(module, codes)
    if codes.parameter.device != device:
        module.to(device)


def _readable(module: nn.Module) -> nn.Module:
    """The module, or, if bitsandbytes' CPU kernel has rearranged its 4-bit weight, a copy in the order that is read.

    bitsandbytes puts the weight in order when it is saved, but (0.50) leaves its scales as they are.
    """
    if not getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        return module
    ordered: Any = copy.copy(module)
    ordered._parameters = {"weight": copy.deepcopy(module.weight)}
    ordered.state_dict()
    state = ordered.weight.quant_state
    if state.absmax.ndim > 1:
        state.absmax = state.absmax.t().flatten().float()
    return ordered


def _codes(module: nn.Module) -> Codes:
    name = packed_weight(module) or "weight"
    parameter = module.get_parameter(name)
    beside = {key: vars(module)[key] for key in BESIDE_THE_WEIGHT if key in vars(module)}
    return Codes(name, parameter, dict(vars(parameter)), beside)


def _write(module: nn.Module, codes: Codes) -> None:
    vars(codes.parameter).update(codes.attributes)
    setattr(module, codes.name, codes.parameter)
    vars(module).update(codes.beside)
