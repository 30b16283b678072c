"""New weights after every step, for an engine that generates while an adapter is trained.

A sparse adapter's support is known in advance: where its entries lie in the checkpoint is found once, and after every
step only the k values θ⁰ + Δ change. They are sent whole and absolute, so a patch can be applied twice, late, or after
others were missed.

    stream = WeightStream(model)
    for step in ...:
        train(...)
        stream.write(f"patches/{step:06d}.safetensors")      # the first with positions, then values only
        engine.send_weights(stream.patches())                # or in process, to vLLM
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_sam.export.base_files import names_in_files
from peft_sam.export.parts import Adapter, Part
from peft_sam.export.patch import Header, WeightPatch, layout_of, write_file
from peft_sam.export.way_back import Checkpoint, Place
from peft_sam.sparse.delta import changed


class Spot(NamedTuple):
    """Where new values go: which of them, in which entries of a tensor of the checkpoint (None: all, in order)."""

    place: Place
    source: Tensor
    indices: Tensor | None


class WeightStream:
    """The values θ⁰ + Δ of an adapter that is being trained, in the tensors and entries of its base's checkpoint.

    Names, shapes and positions are the checkpoint's, where the tensors that transformers fuses or renames lie apart
    under their own names. Heads that are trained densely (`modules_to_save`) go whole.

    Attributes:
        layout: a checksum of names, shapes and positions, by which a receiver knows values without positions.

    Args:
        model: a PEFT model with a SAM adapter that has its support and is not merged.
        adapter_name: which adapter.
        dtype: of the engine's weights, to which the new values are rounded; by default the base model's.

    Raises:
        TypeError, PendingAdapterError: as `export_adapter`.
        ValueError: if there is no such adapter, it has low-rank pairs, a scale, trained rows of embeddings, or a
            trained copy of a tied weight, a parameter is not plain in memory, or new values do not arrive one for one
            in the checkpoint.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", dtype: torch.dtype | None = None) -> None:
        self._adapter = Adapter(model, adapter_name)
        self._adapter.refuse_what_is_besides()
        self._adapter.refuse_pairs("a stream of new weights")
        self._adapter.refuse_untied_heads()
        if hidden := [part.name for part in self._adapter.parts if not part.readable]:
            raise ValueError(f"θ⁰ cannot be read, since it is quantised, offloaded or sharded, in {hidden}.")
        self._dtype = dtype
        self._supports = [part.delta.checked_indices().clone() for part in self._adapter.parts]
        self._heads = self._adapter.head_parameters()
        self._version = 0
        bare, config = self._adapter.bare_base(), self._adapter.config
        self._checkpoint = Checkpoint(bare, names_in_files(config.base_model_name_or_path, config.revision))
        self._spots = self._find_spots()
        self.layout = layout_of([(spot.place.name, spot.place.shape, spot.indices) for spot in self._spots])

    def patches(self) -> list[WeightPatch]:
        """The values as they are now, with positions.

        Raises:
            ValueError: if a value is NaN, or the support is no longer the one with which the stream began.
        """
        new = self._new_values()
        return [
            WeightPatch(s.place.name, tuple(s.place.shape), dtype, new[s.source].to(dtype), s.indices)
            for s in self._spots
            for dtype in [self._dtype or s.place.dtype]
        ]

    def write(self, path: str | os.PathLike[str], indices: bool | None = None) -> Header:
        """Write the values as they are now to one safetensors file (`patch`), whole or not at all.

        Args:
            indices: with the positions, for a receiver that has had no file yet; by default in the first file.

        Returns:
            What the file says of itself; its `model_version` counts from 1.
        """
        patches, first = self.patches(), self._version == 0
        header = write_file(
            path,
            patches,
            version=self._version + 1,
            layout=self.layout,
            indices=first if indices is None else indices,
            numel=self._checkpoint.numel(),
        )
        self._version += 1
        return header

    # Where values go

    def _find_spots(self) -> list[Spot]:
        """Number all new values, carry the numbers to the checkpoint, and read what arrives where."""
        checkpoint, marks, start = self._checkpoint, {}, 0
        of_parameter: dict[int, Any] = {}
        for part, support in zip(self._adapter.parts, self._supports, strict=True):
            of_parameter[id(part.base)] = (start, support)
            start += len(support)
        for head in self._heads:
            of_parameter[id(head)] = (start, None)
            start += head.numel()
        dtype = torch.int32 if start < 2**31 else torch.int64
        own = dict(checkpoint.model.named_parameters(remove_duplicate=False))

        def numbered(parameter: Tensor, first: int, support: Tensor | None) -> Tensor:
            count = parameter.numel() if support is None else len(support)
            numbers = torch.arange(first + 1, first + 1 + count, dtype=dtype, device=parameter.device)
            if support is None:
                return numbers.view(parameter.shape)
            flat = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
            return flat.index_copy_(0, support, numbers).view(parameter.shape)

        expected = 0
        for name in checkpoint.names:
            if (parameter := own.get(name)) is not None and id(parameter) in of_parameter:
                first, support = of_parameter[id(parameter)]
                expected += parameter.numel() if support is None else len(support)
                marks[name] = lambda p=parameter, f=first, s=support: numbered(p, f, s)
        spots = [spot for place, tensor in checkpoint.placed(marks) if (spot := _spot(place, tensor)) is not None]
        arrived = torch.cat([spot.source.cpu() for spot in spots]) if spots else torch.empty(0)
        if len(arrived) != expected or len(arrived.unique()) != start:
            raise ValueError(
                f"of {start:,} changed entries {len(arrived.unique()):,} arrive in the checkpoint of "
                f"{type(checkpoint.model).__name__}, which holds some tensor in another form than the model, or not at "
                "all. Format 'merged' can hold the adapter."
            )
        return spots

    @torch.no_grad()
    def _new_values(self) -> Tensor:
        parts = self._adapter.parts
        new = [self._new_entries(part, support) for part, support in zip(parts, self._supports, strict=True)]
        new += [head.detach().flatten() for head in self._heads]
        device = new[0].device
        return torch.cat([values.to(device) for values in new])

    def _new_entries(self, part: Part, support: Tensor) -> Tensor:
        if part.layer.merged:
            raise ValueError("adapters are merged: call model.unmerge_adapter() first.")
        now = part.layer.deltas(self._adapter.name).get(part.parameter)
        if now is not part.delta or not torch.equal(now.indices.to(support.device), support):
            raise ValueError(
                f"the support of {part.name!r} is not the one with which the stream began: make a new WeightStream, "
                "whose first patch has the new positions."
            )
        values = changed(part.base.detach().take(now.indices), now.values.detach())
        if values.isnan().any():
            raise ValueError(f"θ⁰ + Δ of {part.name!r} has NaNs, which a checkpoint patch cannot hold.")
        return values


def _spot(place: Place, numbers: Tensor) -> Spot | None:
    flat = numbers.flatten()
    where = flat.nonzero().flatten()
    if len(where) == 0:
        return None
    source = flat[where].long() - 1
    if len(where) == len(flat):
        return Spot(place, source, None)
    fits = place.shape.numel() <= 2**31
    return Spot(place, source, where.to(torch.int32 if fits else torch.int64))
