"""The base's embeddings in an adapter file: only those that were resized since, whose new rows no other file has.

Also told to save them, the file has θ⁰, not what is merged into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn

from peft_sam._peft import AuxiliaryTrainingWrapper, BaseTunerLayer
from peft_sam.config import SamConfig
from peft_sam.layers.found import module_of, sam_layers
from peft_sam.layers.owned import stored_parameters


def embeddings_to_save(
    model: nn.Module,
    config: SamConfig,
    adapter_name: str,
    state: Mapping[str, Tensor] | None,
    save: bool | Literal["auto"],
) -> dict[str, Tensor]:
    """The embeddings that belong in the file of an adapter, by name in the model's state dict; tied ones once.

    Args:
        state: of the model, where its parameters are elsewhere; or None.
        save: True for all of them, "auto" for those whose vocabulary is not that of the base model's config. Where the
            model tells of no vocabulary, nobody knows; then those that the adapter changes, with PEFT's warning.
    """
    unknown = save == "auto" and _vocabulary(getattr(model, "config", None)) is None
    adapted = [path for path in embedding_paths(model, adapter_name) if path.endswith(".base_layer")] if unknown else []
    if any(isinstance(model.get_submodule(path), nn.Embedding) for path in adapted):
        save = True
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3
        )
    if not save or (save == "auto" and not is_resized(model, config)):
        return {}
    if save != "auto" and not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=3
        )
    own = dict(model.named_parameters(remove_duplicate=False))
    found, seen = {}, set()
    for path in embedding_paths(model, adapter_name):
        for key, parameter in own.items():
            if key.rpartition(".")[0] == path and id(parameter) not in seen and (state is None or key in state):
                seen.add(id(parameter))
                found[key] = _unmerged(model, parameter, parameter.detach() if state is None else state[key])
    return found


def is_resized(model: Any, config: SamConfig) -> bool:
    """Whether the vocabulary is another than that of the base model's config, as far as that is at hand.

    Warns, as PEFT does, if it is not.
    """
    here = _vocabulary(getattr(model, "config", None))
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    if here is None or not base:
        return False
    try:
        there = type(model.config).from_pretrained(base, revision=config.revision)
    except (OSError, ValueError) as error:
        absent = isinstance(error.__cause__, (RepositoryNotFoundError, EntryNotFoundError))
        if absent and not isinstance(error.__cause__, LocalEntryNotFoundError):  # the hub knows of none
            return False
        warnings.warn(
            f"Could not find a config file in {base} - will assume that the vocabulary was not modified.", stacklevel=4
        )
        return False
    return here != _vocabulary(there)


def _vocabulary(config: Any) -> int | None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "vocab_size", None)
    return found if isinstance(found, int) else None


def embedding_paths(model: Any, adapter_name: str) -> Iterator[str]:
    """Where the input and output embeddings are in a model, as far as an adapter does not train them densely."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # no language model, or one of several
            continue
    inner = {id(_innermost(module, adapter_name)) for module in found if module is not None}
    yield from (name for name, module in model.named_modules() if id(module) in inner)


def _innermost(module: Any, adapter_name: str) -> Any:
    if isinstance(module, AuxiliaryTrainingWrapper):
        if adapter_name in module._adapters:
            return None
        module = module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _unmerged(model: nn.Module, parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the bits that a merged parameter had before."""
    for layer in sam_layers(model).values():
        for name, stored in stored_parameters(layer.get_base_layer()).items() if layer.merged else ():
            if stored is parameter:
                tensor = layer.unmerged(name, tensor)
    return tensor


class Brought:
    """The embeddings that a file brings: parameters of the model and their new values.

    Attributes:
        keys: of the file.
        names: of the parameters, in the unwrapped base model.

    Raises:
        ValueError: if one has another shape than in the model; nothing is changed.
    """

    def __init__(self, state: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> None:
        paths = {module_of(path): path for path in embedding_paths(model, adapter_name)}
        own = dict(model.named_parameters(remove_duplicate=False))
        self.keys: set[str] = set()
        self.names: set[str] = set()
        self._parts: list[tuple[Tensor, Tensor]] = []
        for key, tensor in state.items():
            module, _, name = key.rpartition(".")
            path = paths.get(module_of(module))
            parameter = own.get(f"{path}.{name}") if path else None
            if parameter is None:
                continue
            if tensor.shape != parameter.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"the adapter file has {key!r} with shape {tuple(tensor.shape)}; the model has "
                    f"{tuple(parameter.shape)} there. Was the vocabulary another? Call "
                    f"model.resize_token_embeddings({len(tensor)}) before the adapter is loaded."
                )
            self.keys.add(key)
            self._parts.append((parameter, tensor))
        brought = {id(parameter) for parameter, _ in self._parts}
        for name, parameter in own.items():
            if id(parameter) in brought:
                self.names.add(f"{module_of(name.rpartition('.')[0])}.{name.rpartition('.')[2]}")

    @torch.no_grad()
    def put(self) -> None:
        """Write them into the model; an entry that is equal as far as the coarser dtype tells keeps its bits."""
        for parameter, tensor in self._parts:
            new = tensor.to(parameter.device)
            coarser = min(new.dtype, parameter.dtype, key=lambda dtype: dtype.itemsize)
            parameter.copy_(torch.where(new.to(coarser) == parameter.to(coarser), parameter, new.to(parameter.dtype)))
