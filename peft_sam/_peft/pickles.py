"""`adapter_model.bin`: tensors by name in torch's own format, read so that nothing else can come in."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import torch
from torch import Tensor, nn


def read_pickle(path: str | os.PathLike[str], device: Any = "cpu") -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote of a state dict, by torch's reader for weights only.

    No tensor may claim more numbers than the file holds, and the file may not be compressed.

    Raises:
        ValueError: if it is no such file; says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{packed[0]!r} in it is compressed")
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch's reader has many
        raise ValueError(
            f"the adapter file {os.fspath(path)!r} is truncated or damaged, or a pickle of more than tensors "
            f"({type(error).__name__}: {str(error)[:300]}). Expected what torch.save writes of a state dict."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) and _is_tensor(found[key]) for key in found):
        raise ValueError(
            f"the adapter file {os.fspath(path)!r} holds other things than plain tensors by name: it is no adapter, or "
            "a damaged one."
        )
    return {key: tensor.detach().clone().to(device) for key, tensor in found.items()}


def _is_tensor(found: Any) -> bool:
    return (
        type(found) in (Tensor, nn.Parameter)
        and found.layout == torch.strided
        and found.device.type == "cpu"
        and not found.is_quantized
        and found.numel() * found.element_size() <= found.untyped_storage().nbytes()
    )
