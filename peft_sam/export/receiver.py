"""A plain transformers model that takes the patches of a `WeightStream`: the inference side, in another process."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_sam.export.patch import WeightPatch, layout_of, read_file
from peft_sam.export.way_back import Checkpoint
from peft_sam.sparse.support import check_support


class Target(NamedTuple):
    """Where new values go in one tensor of the model.

    Attributes:
        tensor: of the model.
        positions: flat row-major positions in it.
        source: which of the new values.
        original: what was there.
    """

    tensor: Tensor
    positions: Tensor
    source: Tensor
    original: Tensor


class Layout(NamedTuple):
    """Names, shapes and positions of patches, as they are kept for values that come without."""

    number: str
    patches: list[WeightPatch]
    targets: list[Target]


class WeightReceiver:
    """Writes patches of the checkpoint into a model that was loaded from it, in place.

        model = AutoModelForCausalLM.from_pretrained(base)
        receiver = WeightReceiver(model)
        receiver.apply("patches/000001.safetensors")         # the first has positions
        receiver.apply("patches/000002.safetensors")         # values only

    Tensors that the model holds fused or under other names than its checkpoint are found once, at the first patch.
    Patches are absolute: applying one twice, or after others were missed, leads to the same weights.

    Attributes:
        version: of the file that was applied last; None before, and after patches in process.

    Args:
        model: a plain model with the base's weights, in memory; in any floating-point dtype, to which values are
            rounded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.version: int | None = None
        self._layout: Layout | None = None

    def apply(self, update: str | os.PathLike[str] | Iterable[WeightPatch]) -> None:
        """Write the new values of a file, or of patches in process; all of them, or none on an error.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, has values only while other positions or none are kept here, or does not
                fit the model.
        """
        if isinstance(update, (str, os.PathLike)):
            version, layout, patches = self._from_file(update)
        else:
            version, patches = None, list(update)
            layout = layout_of([(patch.name, patch.shape, patch.indices) for patch in patches])
        _check(patches)
        with torch.no_grad():
            if self._layout is None or self._layout.number != layout:
                found = self._find(patches)
                self.restore()
                targets = [Target(*places, places[0].take(places[1])) for places in found]
                self._layout = Layout(layout, [patch._replace(values=patch.values[:0]) for patch in patches], targets)
            new = torch.cat([patch.values.to(self._device) for patch in patches])
            for target in self._layout.targets:
                values = new[target.source].to(target.tensor.device, target.tensor.dtype)
                target.tensor.put_(target.positions, values)
        self.version = version

    @torch.no_grad()
    def restore(self) -> None:
        """Put the model's own bits back."""
        for target in self._layout.targets if self._layout is not None else ():
            target.tensor.put_(target.positions, target.original)
        self._layout = self.version = None

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _from_file(self, path: str | os.PathLike[str]) -> tuple[int, str, list[WeightPatch]]:
        header, tensors = read_file(path)
        kept = self._layout
        if not header.indices and (kept is None or kept.number != header.layout):
            raise ValueError(
                f"{os.fspath(path)!r} has values only, and "
                + ("no positions are kept here" if kept is None else "the positions kept here are others")
                + ": apply a file with positions first, written by WeightStream.write(path, indices=True)."
            )
        if header.indices:
            named = zip(header.changed_params, header.shapes, strict=True)
            known = [(name, tuple(shape), tensors.get(f"{name}.indices")) for name, shape in named]
        else:
            known = [(patch.name, patch.shape, patch.indices) for patch in kept.patches]  # type: ignore[union-attr]
        patches = []
        for name, shape, indices in known:
            values = tensors[f"{name}.values"]
            patches.append(WeightPatch(name, shape, values.dtype, values, indices))
        return header.model_version, header.layout, patches

    def _find(self, patches: Sequence[WeightPatch]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tensors of the model, positions in them, and which of the new values go there.

        Number the entries of the model, carry the numbers to the checkpoint, and read them where values arrive.
        """
        names = {patch.name for patch in patches}
        checkpoint = Checkpoint(self.model, names)
        tensors = {name: checkpoint.state[name] for name in checkpoint.makers(names)}
        starts, start = {}, 0
        for name, tensor in tensors.items():
            starts[name] = start
            start += tensor.numel()
        dtype = torch.int32 if start < 2**31 else torch.int64
        marks = {
            name: lambda t=tensor, s=starts[name]: torch.arange(
                s + 1, s + 1 + t.numel(), dtype=dtype, device=t.device
            ).view(t.shape)
            for name, tensor in tensors.items()
        }
        there = {patch.name: patch for patch in patches}
        numbers: dict[str, Tensor] = {}
        for place, placed in checkpoint.placed(marks):
            if (patch := there.get(place.name)) is not None:
                if tuple(place.shape) != tuple(patch.shape):
                    raise ValueError(
                        f"{place.name!r} is of shape {tuple(patch.shape)} in the patch and {tuple(place.shape)} in the "
                        "checkpoint of this model: the patch is of another model."
                    )
                flat = placed.flatten()
                found = flat if patch.indices is None else flat[patch.indices.to(flat.device).long()]
                numbers[place.name] = found.to(self._device).long() - 1
        if missing := sorted(there.keys() - numbers.keys()) or [n for n, found in numbers.items() if (found < 0).any()]:
            raise ValueError(
                f"the checkpoint of {type(self.model).__name__} has no {missing}, or not all of it: the patch is of "
                "another model."
            )
        where = torch.cat([numbers[patch.name] for patch in patches])
        order = where.argsort(stable=True)
        bounds = torch.searchsorted(where[order], torch.tensor([*starts.values(), start], device=where.device)).tolist()
        targets = []
        for (name, tensor), low, high in zip(tensors.items(), bounds, bounds[1:], strict=False):
            if low < high:
                source = order[low:high]
                positions = (where[source] - starts[name]).to(tensor.device)
                targets.append((tensor, positions, source))
        return targets


def _check(patches: Sequence[WeightPatch]) -> None:
    """Refuse what is no patch, before anything is written.

    Raises:
        ValueError: if values are missing, too many or NaN, positions are none, or a tensor has several patches.
    """
    if twice := [name for name, number in Counter(patch.name for patch in patches).items() if number > 1]:
        raise ValueError(f"there are several patches of {', '.join(twice)}: pass one patch of each tensor.")
    for patch in patches:
        numel = torch.Size(patch.shape).numel()
        expected = numel if patch.indices is None else len(patch.indices)
        if patch.values.ndim != 1 or len(patch.values) != expected:
            raise ValueError(
                f"{patch.name!r} has values of shape {tuple(patch.values.shape)} for {expected:,} entries."
            )
        if patch.indices is not None:
            check_support(patch.indices.long(), numel, patch.name)
        if patch.values.isnan().any():
            raise ValueError(f"new values of {patch.name!r} have NaNs.")
