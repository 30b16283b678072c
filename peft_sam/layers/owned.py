"""Which parameters belong to a module: those that change when the module is adapted."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Children whose parameters a module reads without calling them.
READ_NOT_CALLED: dict[type[nn.Module], tuple[str, ...]] = {nn.MultiheadAttention: ("out_proj",)}

# Quantised linear layers that are no nn.Linear, by the name of a class, and the parameter or buffer that holds their
# packed weight: HQQ; GPTQ and AWQ, whose kernels are all kinds of gptqmodel's BaseQuantLinear; AQLM; EETQ; Intel's
# Neural Compressor.
PACKED_WEIGHT = {
    "HQQLinear": "W_q",
    "BaseQuantLinear": "qweight",
    "QuantizedLinear": "codes",
    "EetqLinear": "weight",
    "PatchedLinear": "weight",
}

# How modules call the numbers of their inputs and outputs.
FEATURES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("nx", "nf"),
)


def features(module: nn.Module) -> tuple[int | None, ...]:
    """The numbers of inputs and outputs of a module, which PEFT's layers tell; None, None if it has no such numbers."""
    for names in FEATURES:
        if all(hasattr(module, name) for name in names):
            return tuple(getattr(module, name) for name in names)
    return None, None


def read_not_called(module: nn.Module) -> tuple[str, ...]:
    """The children whose parameters are candidates of the module itself; lists of parameters are such, too."""
    read = [name for kind, names in READ_NOT_CALLED.items() if isinstance(module, kind) for name in names]
    return (*read, *parameter_lists(module))


def parameter_lists(module: nn.Module) -> list[str]:
    """The children that are lists or dicts of parameters."""
    return [name for name, m in module.named_children() if isinstance(m, (nn.ParameterList, nn.ParameterDict))]


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that `module` owns, by name relative to it, those of `read_not_called` children included.

    For a weight that is packed (quantised) or elsewhere (offloaded, ZeRO-3) a stand-in tells shape, dtype and device.
    """
    return {
        name: p if is_plain(p) or isinstance(p, DTensor) else _stand_in(module, p)
        for name, p in stored_parameters(module).items()
    }


def stored_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The same parameters as they are stored."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if (packed := packed_weight(module)) is not None:
        weight = own[packed] if packed in own else module.get_buffer(packed)
        own = {"weight": weight, **{name: own[name] for name in ("bias",) if name in own}}  # code books are no weights
    for child in read_not_called(module):
        own.update({f"{child}.{name}": p for name, p in module.get_submodule(child).named_parameters(recurse=False)})
    return own


def stored_parameter(module: nn.Module, name: str) -> Tensor:
    """One of them, by its name relative to the module."""
    child, _, leaf = name.rpartition(".")
    found = module.get_submodule(child)._parameters.get(leaf)
    return stored_parameters(module)[name] if found is None else found


def packed_weight(module: nn.Module) -> str | None:
    """The name of the parameter or buffer that holds the packed weight of a linear layer that is no nn.Linear."""
    names = (PACKED_WEIGHT.get(kind.__name__) for kind in type(module).__mro__)
    return next((name for name in names if name is not None), None)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether a module is a quantiser's linear layer, which multiplies in a way of its own."""
    if isinstance(module, nn.Linear):
        return type(module).forward is not nn.Linear.forward and not is_plain(module.weight)
    return packed_weight(module) is not None


def is_plain(tensor: Tensor | None) -> bool:
    """Whether the numbers of a parameter can be read and added to: dense floats in this process's memory."""
    return (
        tensor is not None
        and (type(tensor) in (nn.Parameter, Tensor) or torch.compiler.is_compiling())
        and tensor.is_floating_point()
        and tensor.element_size() > 1
        and not tensor.is_meta
        and not hasattr(tensor, "ds_id")  # DeepSpeed's ZeRO-3 has taken it apart
    )


def _stand_in(module: nn.Module, parameter: Tensor) -> Tensor:
    device, dtype = parameter.device, parameter.dtype
    shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # of a parameter that ZeRO-3 has taken apart
    if parameter.is_meta:
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is None:
            return parameter  # not loaded yet
        device = torch.device(hook.execution_device)  # Accelerate brings it there when the module runs
    if not dtype.is_floating_point or (dtype.itemsize == 1 and packed_weight(module) is not None):
        if not is_packed_linear(module):
            return parameter
        linear: Any = module
        shape, dtype = torch.Size((linear.out_features, linear.in_features)), torch.float32
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def head_of(wrapper: ModulesToSaveWrapper, adapter_name: str) -> nn.Module:
    """The module that an adapter trains in place of the wrapped one, or the wrapped one if it does not."""
    own = adapter_name in wrapper.modules_to_save
    head: nn.Module = wrapper.modules_to_save[adapter_name] if own else wrapper.original_module
    return head


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` does no more than its class's forward with a frozen weight: no hooks, no patches."""
    return not (module.weight.requires_grad or is_changed(module))


def is_changed(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, or a patch."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
