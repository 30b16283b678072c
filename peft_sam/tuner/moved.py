"""Buffers of the base model that training moves, as running statistics: an adapter file does not hold them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_sam.layers.found import module_of, sam_layers
from peft_sam.layers.owned import is_packed_linear

SHOWN = 3
# where one of the layers has it, and goes with it
RECORD = "buffers_of_the_base"


class MovedBuffersWarning(UserWarning):
    """An adapter is saved whose training has moved buffers of the base model, which the file does not hold."""


def remember_buffers(model: nn.Module) -> None:
    """Keep what the base model's buffers hold, when the first adapter comes."""
    layers = list(sam_layers(model).values())
    if layers and not any(RECORD in vars(layer) for layer in layers):
        layers[0].__dict__[RECORD] = {name: buffer.detach().cpu().clone() for name, buffer in _buffers_of(model)}


def warn_of_moved(model: nn.Module) -> None:
    """Warn if buffers of the base model hold something else than when the first adapter came."""
    every = map(vars, sam_layers(model).values())
    before: dict[str, Tensor] = next((layer[RECORD] for layer in every if RECORD in layer), {})
    moved = [name for name, buffer in _buffers_of(model) if name in before and not _agree(before[name], buffer)]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in moved))
    if not modules:
        return
    named = ", ".join(map(repr, modules[:SHOWN])) + (f" and {len(modules) - SHOWN} more" if modules[SHOWN:] else "")
    warnings.warn(
        f"training has moved buffers of the base model, such as {moved[0]!r}, and the adapter's file does not hold "
        f"them: loaded, the adapter computes something else. It is about {named}. Either keep these modules as they "
        "are (call their .eval() after model.train()), or have the adapter hold them: "
        "SamConfig(modules_to_save=[...]).",
        MovedBuffersWarning,
        stacklevel=3,
    )


def _buffers_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's own floating-point buffers that checkpoints hold, by name in the unwrapped base model."""
    for path, module in model.named_modules():
        parts = path.split(".")
        if "modules_to_save" in parts or "sam_sparse_delta" in parts or is_packed_linear(module):
            continue
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set and _can_move(buffer):
                yield f"{module_of(path)}.{name}".removeprefix("."), buffer


def _can_move(buffer: Tensor | None) -> bool:
    plain = buffer is not None and not buffer.is_meta and not isinstance(buffer, DTensor)
    return plain and buffer is not None and buffer.is_floating_point()


def _agree(before: Tensor, now: Tensor) -> bool:
    """Whether a buffer holds what it did, as far as the coarser of the two dtypes tells."""
    now = now.detach().cpu()
    coarse = min(before.dtype, now.dtype, key=lambda dtype: dtype.itemsize)
    one, other = before.to(coarse), now.to(coarse)
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
