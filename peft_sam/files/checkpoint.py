"""The adapter file and the layers: what is written, and what a file must be before anything is read from it.

For each parameter with entries a file holds two tensors, `<module>.sam_sparse_delta.<parameter>.support`, the code of
its sorted flat row-major positions (`coding`), and `<module>.sam_sparse_delta.<parameter>.values`; for each low-rank
pair `<module>.sam_sparse_low_rank.lora_A` and `….lora_B`: those of the model's state dict, without the adapter's name.
Files of format 1 have the positions themselves, int32 or int64, as `….indices`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_sam._peft import AuxiliaryTrainingWrapper
from peft_sam.layers.base import SamLayer
from peft_sam.layers.deltas import name_of
from peft_sam.layers.found import module_of
from peft_sam.sparse.coding import decode
from peft_sam.sparse.delta import PendingAdapterError, delta_dtype
from peft_sam.sparse.support import check_support

KEY = re.compile(r"^(?P<module>.*)\.sam_sparse_delta\.(?P<parameter>[^.]+)\.(?P<part>indices|support|values)\Z")
PAIR = re.compile(r"^(?P<module>.*)\.sam_sparse_low_rank\.(?P<part>lora_[AB])\Z")
# dtypes that numbers of adapters can have in files
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# what the model's state dict has before an adapter's name
KINDS = ("sam_sparse_delta", "sam_sparse_low_rank")


def split(key: str, adapter_name: str) -> tuple[str, str, str]:
    """A key of a state dict in front of the kind of change it belongs to, the kind, and what comes after the adapter's
    name; the kind is "" for other keys and other adapters."""
    for kind in KINDS:
        before, found, after = key.rpartition(f".{kind}.{adapter_name}.")
        if found:
            return before, kind, after
    return "", "", key


def is_own(key: str) -> bool:
    """Whether a key of a file is of a delta or a pair."""
    return bool(KEY.match(key) or PAIR.match(key))


def modules_in(state: Mapping[str, Tensor]) -> set[str]:
    """The names of the modules that a state dict has deltas or pairs for."""
    matches = (KEY.match(key) or PAIR.match(key) for key in state)
    return {module_of(match["module"]) for match in matches if match}


def to_file(
    state: Mapping[str, Tensor], layers: Mapping[str, SamLayer], adapter_name: str, save_dtype: str | None
) -> dict[str, Tensor]:
    """The adapter's entries of a state dict as they are written, values in `save_dtype` (None: the one they have).

    Raises:
        PendingAdapterError: if the adapter has no support yet.
        ValueError: if a value is too large for `save_dtype`.
    """
    for layer in layers.values():
        if any(delta.pending for delta in layer.deltas(adapter_name).values()):
            raise PendingAdapterError(adapter_name, "saved")
    written = {}
    for key, tensor in state.items():
        before, kind, after = split(key, adapter_name)
        if before and module_of(before) not in layers:
            continue  # a shared module under another of its names
        if kind:
            key = f"{before}.".replace(".original_module.", ".")[:-1] + f".{kind}.{adapter_name}.{after}"
        parameter, _, part = after.rpartition(".")
        if (part == "values" or part.startswith("lora_")) and kind and save_dtype is not None:
            name = f"{module_of(before)}.{parameter or 'weight'}"
            written[key] = _in_dtype(tensor, getattr(torch, save_dtype), name)
        else:
            written[key] = tensor
    return written


def _in_dtype(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    found = values.to(dtype)
    if bool((found.isinf() & ~values.isinf()).any()):
        raise ValueError(
            f"a value of {name!r}, {float(values.abs().max()):.3g}, is too large for save_dtype={str(dtype)[6:]!r}: "
            "use 'bfloat16' or 'float32'."
        )
    return found


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
            found[module_of(match["module"])][name_of(match["parameter"])][match["part"]] = tensor
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
    if counts is not None:
        _check_counts(counts_in(checked), counts, layers)
    return checked


def read_pairs(
    state: Mapping[str, Tensor], layers: Mapping[str, SamLayer], adapter_name: str, whole: bool
) -> dict[str, dict[str, Tensor]]:
    """Check the tensors of an adapter's low-rank pairs, which may come from a stranger; nothing is changed.

    Args:
        whole: whether all of the adapter's pairs must be there; else, if any is, those of weights with entries.

    Returns:
        module → "lora_A" and "lora_B" → tensor.

    Raises:
        ValueError: if they are not those of the pairs that the adapter has in the model; says which and how.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        if match := PAIR.match(key):
            found[module_of(match["module"])][match["part"]] = tensor
    pairs = {module: layer.pair(adapter_name) for module, layer in layers.items()}
    mine = {module: dict(pair.named_parameters()) for module, pair in pairs.items() if pair is not None}
    matches = [match for key in state if (match := KEY.match(key)) and match["parameter"] == "weight"]
    having = {module_of(match["module"]) for match in matches} if found else set()
    needed = mine.keys() if whole else mine.keys() & having
    for module in sorted(found.keys() | needed):
        for part in ("lora_A", "lora_B"):
            own, it = mine.get(module, {}).get(part), found.get(module, {}).get(part)
            if own is None or it is None or it.shape != own.shape or it.dtype not in FLOATS:
                there = "nothing" if it is None else f"shape {tuple(it.shape)} and {it.dtype}"
                here = "no low-rank pair there" if own is None else f"{part} of shape {tuple(own.shape)}"
                raise ValueError(
                    f"the adapter file has {there} as {part} of the low-rank pair of {module!r}; the model with this "
                    f"config has {here}: the adapter was made for another base model or another r, or the file is "
                    "damaged."
                )
            if bool((it.to(own.dtype).isinf() & it.isfinite()).any()):
                raise ValueError(
                    f"the adapter file gives {part} of {module!r} a value of {float(it.abs().max()):.3g}, which is "
                    f"too large for {str(own.dtype)[6:]}: the file is damaged, or of another base model."
                )
    return found


def counts_in(found: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, int]:
    """Entries per parameter name of what `read_file` found."""
    return {f"{module}.{name}": len(i) for module, parts in found.items() for name, (i, _) in parts.items()}


def check_others(state: Mapping[str, Tensor], model: nn.Module, adapter_name: str, shapes: bool) -> None:
    """Check the tensors of a file that are neither deltas nor embeddings: heads (`modules_to_save`) may be there.

    Args:
        shapes: whether heads must have the shapes that they have in the model, too.

    Raises:
        ValueError: if one would overwrite what does not belong to the adapter, or has the wrong shape.
    """
    own, heads = model.state_dict(keep_vars=True), set()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            names: Mapping[str, str] = module.adapter_state_dict_load_map(adapter_name)
            heads |= {f"{name}.{key}" for key in names.values()}
    for key, tensor in state.items():
        if key not in own:
            continue  # PEFT reports it
        if key not in heads:
            raise ValueError(
                f"the adapter file has a tensor {key!r}, which is a parameter of the base model or of another adapter: "
                "the file is damaged, or meant to change what is not its own."
            )
        if tensor.is_floating_point() != own[key].is_floating_point():
            raise ValueError(f"the adapter file has {key!r} as {tensor.dtype}; the model has {own[key].dtype} there.")
        if shapes and tensor.shape != own[key].shape:
            raise ValueError(
                f"the adapter file has {key!r} with shape {tuple(tensor.shape)}; the model has {tuple(own[key].shape)} "
                "there. Was the number of labels another?"
            )


def _check_delta(name: str, parts: Mapping[str, Tensor], parameter: Tensor) -> tuple[Tensor, Tensor]:
    # files of format 1 have both with resized embeddings: PEFT saved all that a model has below these
    if "values" not in parts or not parts.keys() & {"indices", "support"}:
        raise ValueError(
            f"the adapter file has {' and '.join(sorted(parts))} of {name!r}; expected support (indices in files of "
            "format 1) and values: the file is damaged."
        )
    values, numel = parts["values"], parameter.numel()
    if values.dtype not in FLOATS or values.ndim != 1 or not len(values):
        raise ValueError(
            f"the adapter file gives {name!r} values of shape {tuple(values.shape)} and {values.dtype}; expected "
            "floating-point numbers of 16, 32 or 64 bits, 1-D, at least one."
        )
    try:
        indices = decode(parts["support"], len(values), numel, name) if "support" in parts else parts["indices"]
        check_support(indices, numel, name)
    except ValueError as error:
        raise ValueError(
            f"{error} The base model's parameter has shape {tuple(parameter.shape)}: the adapter was made for another "
            "base model, or the file is damaged."
        ) from None
    if len(indices) != len(values):
        raise ValueError(f"the adapter file gives {name!r} {len(values)} values for {len(indices)} indices.")
    dtype = delta_dtype(parameter.dtype)
    if bool((values.to(dtype).isinf() & values.isfinite()).any()):
        raise ValueError(
            f"the adapter file gives {name!r} a value of {float(values.abs().max()):.3g} in {str(values.dtype)[6:]}, "
            f"which is too large for the {str(dtype)[6:]} of its deltas: the file is damaged, or of another base model."
        )
    return indices, values


def _check_counts(in_file: Mapping[str, int], counts: Mapping[str, int], layers: Mapping[str, SamLayer]) -> None:
    # A base model may have got other names since, which PEFT's key_mapping brought into the file: those that are gone
    # must have as many entries as those that are new.
    here = {f"{module}.{name}" for module, layer in layers.items() for name in layer.parameters_below()}
    gone = {name: number for name, number in counts.items() if name not in here}
    new = {name: number for name, number in in_file.items() if name not in counts}
    if gone and sorted(gone.values()) == sorted(new.values()):
        counts = {name: number for name, number in counts.items() if name in here} | new
    for name in sorted(in_file.keys() | counts.keys()):
        if in_file.get(name, 0) != counts.get(name, 0):
            raise ValueError(
                f"the adapter file has {in_file.get(name, 0)} entries for {name!r} where adapter_config.json says "
                f"{counts.get(name, 0)}: the two files do not belong together, or one is damaged."
            )
