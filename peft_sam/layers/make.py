"""Which layer adapts which module. A new fast layer is one class and one row of `LAYERS`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sam._peft import BaseTunerLayer, quantization_backend
from peft_sam.layers.base import SamLayer
from peft_sam.layers.embedding import SamEmbedding, TiedEmbedding, is_scaled
from peft_sam.layers.linear import SamLinear
from peft_sam.layers.owned import is_packed_linear, is_plain

# forward function of a class of modules → the layer that computes the same faster
LAYERS: dict[Any, type[SamLayer]] = {
    nn.Linear.forward: SamLinear,
    Conv1D.forward: SamLinear,
    nn.Embedding.forward: SamEmbedding,
}


def make_layer(module: nn.Module, tuner: Any, targeted: bool = True) -> SamLayer:
    """The layer of a tuner for `module`: the fast one if its forward is known, or if it is a quantised linear layer.

    Around another tuner's layer of a linear one, too, for its low-rank pairs.

    Args:
        targeted: whether the module itself is a target, or only tied to one.
    """
    if not targeted and isinstance(module, nn.Embedding) and LAYERS.get(type(module).forward) is SamEmbedding:
        return TiedEmbedding(module)
    if is_scaled(module):
        return SamEmbedding(module)
    if is_packed_linear(module) or (isinstance(module, nn.Linear) and not is_plain(module.weight)):
        layer = SamLinear(module)
        layer.quantization_backend = quantization_backend(module, tuner)
        return layer
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
    if inner is not None and LAYERS.get(type(inner).forward) is SamLinear and is_plain(inner.weight):
        return SamLinear(module)
    return LAYERS.get(type(module).forward, SamLayer)(module)
