"""The adapter file and the layers: what is written, and what a file must be before anything is read from it.

For each parameter with entries a file holds two tensors,
`<module>.sam_sparse_delta.<parameter>.indices` (sorted flat row-major positions; int32 where they fit) and
`<module>.sam_sparse_delta.<parameter>.values`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_sam.delta import PendingAdapterError
from peft_sam.layer import SEPARATOR, SamLayer
from peft_sam.support import check_support
from peft_sam.targets import base_name

PEFT_PREFIX = "base_model.model."
KEY = re.compile(r"^(?P<module>.*)\.sam_sparse_delta\.(?P<parameter>[^.]+)\.(?P<part>indices|values)$")


def sam_layers(model: nn.Module) -> dict[str, SamLayer]:
    """The sparse layers of a model by module name in the unwrapped base model, in its order."""
    return {
        base_name(name).removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, SamLayer)
    }


def modules_in(state: Mapping[str, Tensor]) -> set[str]:
    """The names of the modules that a state dict has deltas for."""
    matches = (KEY.match(key) for key in state)
    return {base_name(match["module"]).removeprefix(PEFT_PREFIX) for match in matches if match}


def to_file(state: Mapping[str, Tensor], layers: Mapping[str, SamLayer], adapter_name: str) -> dict[str, Tensor]:
    """The adapter's entries of a state dict as they are written.

    Raises:
        PendingAdapterError: if the adapter has no support yet.
    """
    for layer in layers.values():
        if any(delta.pending for delta in layer.deltas(adapter_name).values()):
            raise PendingAdapterError(adapter_name, "saved")
    limit = torch.iinfo(torch.int32).max
    return {
        key: tensor.to(torch.int32)
        if key.endswith(".indices") and tensor.dtype == torch.int64 and (not len(tensor) or int(tensor[-1]) <= limit)
        else tensor
        for key, tensor in state.items()
    }


def read_file(
    state: Mapping[str, Tensor], layers: Mapping[str, SamLayer], adapter_name: str, counts: Mapping[str, int] | None
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Check an adapter's tensors, which may come from a stranger, against the model; nothing is changed.

    Args:
        state: tensors of a file; keys without adapter name. Keys that are no deltas are ignored.
        layers: of the model, by base name; the adapter must be injected.
        counts: entries per parameter that the config announces, or None to take what the file has.

    Returns:
        module → parameter → (indices, values).

    Raises:
        ValueError: says which tensor is wrong and how.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in state.items():
        if match := KEY.match(key):
            module = base_name(match["module"]).removeprefix(PEFT_PREFIX)
            found[module][match["parameter"].replace(SEPARATOR, ".")][match["part"]] = tensor
    if not found:
        raise ValueError(
            "the adapter file holds no sparse deltas (no key with '.sam_sparse_delta.'): it is not a SAM sparse "
            "adapter, or an empty one."
        )
    checked: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for module, parameters in found.items():
        own = layers[module].parameters_below() if module in layers else {}
        reached = module in layers and adapter_name in layers[module].sam_sparse_delta
        checked[module] = {}
        for name, parts in parameters.items():
            full = f"{module}.{name}"
            if not reached or name not in own:
                raise ValueError(
                    f"the adapter file has deltas for {full!r}, which the base model does not have or the config does "
                    "not target: the adapter was made for another base model, or the file is damaged."
                )
            checked[module][name] = _check_delta(full, parts, own[name])
    _check_counts(checked, counts)
    return checked


def _check_delta(name: str, parts: Mapping[str, Tensor], parameter: Tensor) -> tuple[Tensor, Tensor]:
    if parts.keys() != {"indices", "values"}:
        missing = ({"indices", "values"} - parts.keys()).pop()
        raise ValueError(f"the adapter file lacks the {missing} of {name!r}: the file is damaged.")
    indices, values = parts["indices"], parts["values"]
    try:
        check_support(indices, parameter.numel(), name)
    except ValueError as error:
        raise ValueError(
            f"{error} The base model's parameter has shape {tuple(parameter.shape)}: the adapter was made for another "
            "base model, or the file is damaged."
        ) from None
    if not values.is_floating_point() or values.shape != indices.shape or not len(indices):
        raise ValueError(
            f"the adapter file gives {name!r} values of shape {tuple(values.shape)} and {values.dtype} for indices of "
            f"shape {tuple(indices.shape)}; expected as many floating-point values as indices, at least one."
        )
    return indices, values


def _check_counts(checked: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], counts: Mapping[str, int] | None) -> None:
    if counts is None:
        return
    in_file = {f"{module}.{name}": len(i) for module, of in checked.items() for name, (i, _) in of.items()}
    for name in sorted(in_file.keys() | counts.keys()):
        if in_file.get(name, 0) != counts.get(name, 0):
            raise ValueError(
                f"the adapter file has {in_file.get(name, 0)} entries for {name!r} where adapter_config.json says "
                f"{counts.get(name, 0)}: the two files do not belong together, or one is damaged."
            )
