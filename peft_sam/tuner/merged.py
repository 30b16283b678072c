"""A model that is merged for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from peft import PeftModel
from torch import nn

from peft_sam.layers.found import sam_layers

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def merged(model: Model, adapter_names: list[str] | None = None, safe_merge: bool = False) -> Iterator[Model]:
    """The model with θ⁰ + Δ in its base, inside a `with` block; afterwards, errors included, with its own bits.

        with peft_sam.merged(model):
            model.generate(...)

    Inside, the model runs as fast as the base model does alone. It writes k entries when entering and k when leaving.

    Args:
        model: made by `get_peft_model` or `PeftModel.from_pretrained`.
        adapter_names: which adapters; the active ones by default.
        safe_merge: refuse entries that would not be finite.

    Raises:
        TypeError: if it is another model, or has no SAM adapter.
        ValueError: if adapters are merged already, one cannot be merged, or, with `safe_merge`, would not be finite.
    """
    layers = list(sam_layers(model).values())
    if not layers or not isinstance(model, PeftModel):
        raise TypeError(f"merged(model) is for a PeftModel with SAM adapters; got a {type(model).__name__}.")
    if names := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise ValueError(f"adapters {names} are merged already: call model.unmerge_adapter() first.")
    try:
        model.merge_adapter(adapter_names, safe_merge)
        yield model
    finally:
        if any(layer.merged for layer in layers):
            model.unmerge_adapter()
