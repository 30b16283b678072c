"""torch's transformer encoders, in eval mode, read the weights of their children past these, and so past their deltas.

There is a switch in each that has them call their children instead, which they do in train mode anyway.
"""

from __future__ import annotations

from torch import nn

from peft_sam.layers.base import SamLayer

# module → its switch, which is falsy where the children are called
SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
KEPT = "_sam_sparse_fast_path"


def have_children_called(model: nn.Module) -> None:
    """Turn the fast path off wherever a child has a sparse layer."""
    for module in model.modules():
        switch = SWITCHES.get(type(module))
        if switch and KEPT not in module.__dict__ and any(isinstance(inner, SamLayer) for inner in module.modules()):
            module.__dict__[KEPT] = module.__dict__[switch]
            module.__dict__[switch] = 0


def restore_fast_paths(model: nn.Module) -> None:
    """Leave the switches as they were."""
    for module in model.modules():
        if KEPT in module.__dict__:
            module.__dict__[SWITCHES[type(module)]] = module.__dict__.pop(KEPT)
