"""Putting a file's tensors into an adapter that was injected for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_sam._peft import file_follows
from peft_sam.config import SamConfig
from peft_sam.files.checkpoint import check_others, counts_in, is_own, read_file, read_pairs
from peft_sam.files.embeddings import Brought
from peft_sam.files.fingerprint import check_base
from peft_sam.layers.found import deltas_of, has_support, layers_with, sam_layers
from peft_sam.layers.linear import SamLinear
from peft_sam.sparse.delta import SparseDelta
from peft_sam.tuner.candidates import record_counts


def fill(model: nn.Module, config: SamConfig, adapter_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check all tensors of a file, then give the adapter its supports and values, and the base a resized embedding.

    Returns:
        the rest of the tensors: heads.

    Raises:
        ValueError: if one does not belong there; nothing is changed then.
    """
    layers = layers_with(model, adapter_name)
    replaces = has_support(model, adapter_name)
    rest = {key: tensor for key, tensor in state.items() if not is_own(key)}
    embeddings = Brought(rest, model, adapter_name)
    rest = {key: tensor for key, tensor in rest.items() if key not in embeddings.keys}
    check_others(rest, model, adapter_name, shapes=replaces or bool(embeddings.keys))
    found = read_file(state, layers, adapter_name, None if replaces else config.counts)
    pairs = read_pairs(state, layers, adapter_name, whole=not replaces)
    if file_follows.get() is not None and config.selection is not None:
        kept = {name: text for name, text in config.fingerprints.items() if name not in embeddings.names}
        check_base(sam_layers(model), kept, config.strict_base)
    embeddings.put()
    before = deltas_of(model, adapter_name)
    trainable = any(delta.values.requires_grad for delta in before.values()) if replaces else None
    same = replaces and _holds(before, found)
    for name, layer in layers.items():
        parts = found.get(name, {})
        layer.set_support(
            adapter_name,
            {key: indices for key, (indices, _) in parts.items()},
            {key: values for key, (_, values) in parts.items()},
            trainable,
        )
        if isinstance(layer, SamLinear) and layer.pair(adapter_name) is not None:
            layer.set_pair(adapter_name, pairs.get(name))
        if hasattr(model, "hf_device_map"):
            for delta in layer.deltas(adapter_name).values():
                delta.expect_dispatch()
            if (pair := layer.pair(adapter_name)) is not None:
                pair.expect_dispatch()
    if not same and (replaces or config.counts != counts_in(found)):
        record_counts(config, layers, adapter_name, {} if replaces else config.selection)
    return rest


def _holds(deltas: Mapping[str, SparseDelta], found: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> bool:
    """Whether deltas have the supports of a file."""
    supports = {f"{module}.{name}": indices for module, parts in found.items() for name, (indices, _) in parts.items()}
    return supports.keys() == deltas.keys() and all(
        torch.equal(indices, deltas[name].checked_indices().to(indices)) for name, indices in supports.items()
    )
