"""Patches of a checkpoint: in a process, and in a safetensors file.

For each changed tensor of the checkpoint the file has

    <name>.indices   flat row-major positions, increasing; int32 where they fit, else int64
    <name>.values    θ⁰ + Δ at these positions

or `<name>.values` alone, all entries in order, where every entry is given. A file of values only has no indices at all:
it is for a receiver that keeps those of an earlier one. The header says, as strings:

    sparse           "True"
    model_version    which update this is, counted from 1
    sparsity         share of the checkpoint's entries that the patch leaves alone
    changed_params   the names, as a JSON list
    checksums        CRC-32 of the bytes of each tensor of the file, by their names' order, as a JSON list
    layout           checksum of names, shapes and positions; equal in the files of a stream
    indices          "True", or "False" for values only
    shapes           with indices: of the whole tensors, in the order of changed_params, as a JSON list

The names of the tensors and the first four fields are those of TRL's files of sparse updates (the post "Delta Weight
Sync in TRL" on the Hugging Face blog, and huggingface/trl pull request 5417).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class WeightPatch(NamedTuple):
    """New values of entries of one tensor of a checkpoint.

    The fields are those of vLLM's `CheckpointWeightPatch`, which
    `vllm.model_executor.model_loader.checkpoint_weight_patch.load_checkpoint_weight_patches` takes, and, with
    `full_shape`, of its `SparseWeightPatch`, which `SparseNCCLTrainerWeightTransferEngine.send_weights` takes
    (vllm-project/vllm pull requests 50723 and 53751). Both take sparse and dense ones in separate calls.

    Attributes:
        name, shape, dtype: of the whole tensor in the checkpoint.
        values: at `indices`, or of all entries in order; 1-D.
        indices: flat row-major positions, increasing, int32 where they fit, else int64; None where all are given.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The name that `SparseWeightPatch` has for `shape`."""
        return self.shape


class Header(NamedTuple):
    """What a file says of itself: the fields above, and `size`, its bytes."""

    model_version: int
    sparsity: float
    changed_params: list[str]
    checksums: list[str]
    layout: str
    indices: bool
    shapes: list[list[int]]
    size: int


def write_file(
    path: str | os.PathLike[str],
    patches: Sequence[WeightPatch],
    *,
    version: int,
    layout: str,
    indices: bool,
    numel: int,
) -> Header:
    """Write patches of a checkpoint of `numel` entries, whole or not at all."""
    tensors = {}
    for patch in patches:
        if indices and patch.indices is not None:
            tensors[f"{patch.name}.indices"] = patch.indices.cpu()
        tensors[f"{patch.name}.values"] = patch.values.cpu()
    header = Header(
        version,
        1 - sum(len(patch.values) for patch in patches) / numel,
        [patch.name for patch in patches],
        _checksums(tensors),
        layout,
        indices,
        [list(patch.shape) for patch in patches] if indices else [],
        0,
    )
    said: dict[str, Any] = {"format": "pt", "sparse": True, **header._asdict()}
    del said["size"]
    texts = {key: value if isinstance(value, str) else _text(value) for key, value in said.items()}
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata=texts)
        size = beside.stat().st_size
        beside.replace(target)  # a receiver that waits for the file never sees half of it
    finally:
        beside.unlink(missing_ok=True)
    return header._replace(size=size)


def read_file(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """What a file says of itself, and its tensors, which are read as they are used: the file is memory-mapped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no file of `write_file`.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no patch file at {name!r}")
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = Header(
            model_version=int(said["model_version"]),
            sparsity=float(said["sparsity"]),
            changed_params=json.loads(said["changed_params"]),
            checksums=json.loads(said["checksums"]),
            layout=said["layout"],
            indices=said["indices"] == "True",
            shapes=json.loads(said["shapes"]),
            size=os.path.getsize(path),
        )
        if {key.removesuffix(".values") for key in tensors if key.endswith(".values")} != set(header.changed_params):
            raise ValueError("changed_params are not the tensors with values")
        checksums = zip(sorted(tensors), _checksums(tensors), header.checksums, strict=True)
        if wrong := [key for key, found, stated in checksums if found != stated]:
            raise ValueError(f"the checksums of {wrong} are not those of the header")
        if header.indices:
            named = zip(header.changed_params, header.shapes, strict=True)
            if layout_of([(name, shape, tensors.get(f"{name}.indices")) for name, shape in named]) != header.layout:
                raise ValueError("the layout is not that of the shapes and indices")
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name!r} is not a file of patches, or a damaged one ({type(error).__name__}: {error}); expected a file "
            "written by WeightStream.write or export_adapter(..., 'checkpoint_patch')."
        ) from error
    return header, tensors


def layout_of(tensors: Sequence[tuple[str, Sequence[int], Tensor | None]]) -> str:
    """A checksum of the names, shapes and positions of patches."""
    found = zlib.crc32(json.dumps([[name, list(shape)] for name, shape, _ in tensors]).encode())
    for _, _, indices in tensors:
        found = zlib.crc32(b"" if indices is None else _bytes(indices.to("cpu", torch.int64)), found)
    return f"{found:08x}"


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _checksums(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{zlib.crc32(_bytes(tensors[name])):08x}" for name in sorted(tensors)]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(torch.uint8).numpy()
