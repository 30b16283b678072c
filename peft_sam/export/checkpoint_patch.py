"""What an adapter changes in the checkpoint files of its base model, entry by entry.

Files: `checkpoint_patch.safetensors` has for each changed tensor of the checkpoint

    <name>.indices   flat row-major positions, increasing; int32 where they fit, else int64
    <name>.values    θ⁰ + Δ at these positions, in the base model's dtype

or, where every entry is given (heads that are trained densely), `<name>.values` alone, all entries in order.
`checkpoint_patch.json` has under "tensors" the full "shape" and the "dtype" of each, and what it is a patch of.
To apply it to a checkpoint's tensors:

    for name, about in json.load(open("checkpoint_patch.json"))["tensors"].items():
        values = patch[f"{name}.values"]
        if f"{name}.indices" in patch:
            tensors[name].view(-1)[patch[f"{name}.indices"].long()] = values
        else:
            tensors[name] = values.view(about["shape"])

These are the fields of vLLM's `CheckpointWeightPatch(name, shape, dtype, values, indices)`, by which
`vllm.model_executor.model_loader.checkpoint_weight_patch` and its weight transfer over NCCL take sparse updates
(vllm-project/vllm pull requests 50723 and 53751). vLLM takes sparse and dense ones in separate calls.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from peft_sam.export.base_files import name_in_files, names_in_files
from peft_sam.export.parts import Adapter
from peft_sam.sparse.delta import changed

NAME = "checkpoint_patch"
VERSION = 1
# the numbered layer that a parameter belongs to
LAYER = re.compile(r"^.*?\.\d+\.")

State = Mapping[str, Tensor]


class Patch(NamedTuple):
    """New values of entries of one tensor of a checkpoint.

    Attributes:
        shape: of the whole tensor.
        indices: flat row-major positions, increasing; None where every entry is given.
        values: as many, or as many as the tensor has entries.
    """

    shape: torch.Size
    indices: Tensor | None
    values: Tensor


def write_patch(adapter: Adapter, folder: Path) -> None:
    """Write the patch of the checkpoint that the adapter's base model was loaded from, or would save."""
    found = patches(adapter)
    tensors, about = {}, {}
    for name, patch in found.items():
        if patch.indices is not None:
            dtype = torch.int32 if patch.shape.numel() <= 2**31 else torch.int64
            tensors[f"{name}.indices"] = patch.indices.to("cpu", dtype)
        tensors[f"{name}.values"] = patch.values.cpu()
        about[name] = {"shape": list(patch.shape), "dtype": str(patch.values.dtype).removeprefix("torch.")}
    base = {"base_model": adapter.config.base_model_name_or_path, "revision": adapter.config.revision}
    (folder / f"{NAME}.json").write_text(json.dumps({"version": VERSION, **base, "tensors": about}, indent=2))
    save_file(tensors, folder / f"{NAME}.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def patches(adapter: Adapter) -> dict[str, Patch]:
    """What the adapter changes, by name in the checkpoint.

    transformers renames, fuses and splits tensors between a checkpoint and a model. The new values go the way back
    that `save_pretrained` goes, in tensors that are NaN where nothing changes, one layer of the model at a time. Where
    the files that the base was loaded from are at hand, names are theirs; a tied tensor that they hold twice is
    changed twice.

    Raises:
        ValueError: if a new value is NaN, or new values do not arrive one for one in the checkpoint.
    """
    bare, changes = adapter.bare_base(), _changes(adapter)
    state, parameters = bare.state_dict(), dict(bare.named_parameters(remove_duplicate=False))
    in_files = names_in_files(adapter.config.base_model_name_or_path, adapter.config.revision)
    prefix = getattr(bare, "base_model_prefix", "")
    names, revert = _saved_names(bare, state, parameters), _way_back(bare)
    changing = {name: changes[id(p)] for name, p in parameters.items() if id(p) in changes}
    names += [n for n in changing if n not in names and name_in_files(n, in_files, prefix) in in_files]

    def marked(name: str) -> Tensor:
        unchanged = state[name].new_full((), torch.nan).expand(state[name].shape)
        return changing[name].applied_to(unchanged) if name in changing else unchanged

    shapes = {name: tensor.shape for name, tensor in revert({name: state[name].to("meta") for name in names}).items()}
    found: dict[str, Patch] = {}
    for group in _layers(names):
        if not changing.keys().isdisjoint(group):
            tensors = revert({name: marked(name) for name in group})
            if any(shapes.get(name) != tensor.shape for name, tensor in tensors.items()):
                found = _read(revert({name: marked(name) for name in names}))  # a tensor is made from several layers
                break
            found |= _read(tensors)
    expected = [len(changing[name].values) for name in names if name in changing]
    arrived = [len(patch.values) for patch in found.values()]
    if sum(arrived) != sum(expected) or {id(parameters[n]) for n in names if n in changing} != changes.keys():
        raise ValueError(
            f"of {sum(expected):,} changed entries {sum(arrived):,} arrive in the checkpoint of "
            f"{type(bare).__name__}, which holds some tensor in another form than the model, or not at all. Format "
            "'merged' can hold the adapter."
        )
    return {name_in_files(name, in_files, prefix): patch for name, patch in found.items()}


class _Change(NamedTuple):
    indices: Tensor | None
    values: Tensor

    def applied_to(self, unchanged: Tensor) -> Tensor:
        if self.indices is None:
            return self.values.view(unchanged.shape)
        return unchanged.flatten().index_copy(0, self.indices, self.values).view(unchanged.shape)


def _changes(adapter: Adapter) -> dict[int, _Change]:
    """What changes, by the identity of the parameter: a tied one has several names."""
    changes = {id(p): _Change(None, p.detach().flatten()) for p in adapter.head_parameters()}
    for part in adapter.parts:
        indices = part.delta.checked_indices()
        values = changed(part.base.detach().take(indices), part.delta.values.detach())
        if values.isnan().any():
            raise ValueError(f"θ⁰ + Δ of {part.name!r} has NaNs, which a checkpoint patch cannot hold.")
        changes[id(part.base)] = _Change(indices, values)
    return changes


def _saved_names(bare: nn.Module, state: State, parameters: Mapping[str, Any]) -> list[str]:
    """The floating-point tensors that a checkpoint has, under their names in the model; tied ones once."""
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    if isinstance(bare, PreTrainedModel):
        ignored = set(bare._keys_to_ignore_on_save or ())
        return list(remove_tied_weights_from_state_dict({n: state[n] for n in names if n not in ignored}, bare))
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(id(parameters.get(name, state[name])), name)
    return list(first.values())


def _way_back(bare: nn.Module) -> Callable[[dict[str, Tensor]], State]:
    """From tensors of the model to tensors of the checkpoint."""
    if isinstance(bare, PreTrainedModel):
        return lambda state: revert_weight_conversion(bare, state)
    return lambda state: state


def _layers(names: Iterable[str]) -> Iterable[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = LAYER.match(name)
        groups[match[0] if match else ""].append(name)
    return groups.values()


def _read(tensors: State) -> dict[str, Patch]:
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        indices = flat.isnan().logical_not_().nonzero().flatten()
        if len(indices) == len(flat):
            found[name] = Patch(tensor.shape, None, flat)
        elif len(indices):
            found[name] = Patch(tensor.shape, indices, flat[indices])
    return found
