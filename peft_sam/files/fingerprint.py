"""Whether a base model is the one that an adapter was made for, told by some base values at the selected places.

A fingerprint is text, one per parameter, in `adapter_config.json`: the dtype of the base, then in base64 the positions
of up to 16 entries, evenly spread over the support, and the base's bits there. Of a weight that only a low-rank pair
changes they are spread over all of it.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from peft_sam.layers.base import SamLayer
from peft_sam.layers.owned import is_plain, stored_parameters

ENTRIES = 16
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 5


class OtherBaseWarning(UserWarning):
    """An adapter is put on a base model with other values than the one it was made for."""


def fingerprints(layers: Mapping[str, SamLayer], adapter_name: str) -> dict[str, str]:
    """The fingerprint of each parameter that the adapter changes, by name in the base model.

    What is quantised, offloaded, sharded or merged cannot be read and has none.
    """
    found = {}
    for module, layer in layers.items():
        for name, parameter in _readable(layer).items():
            delta = layer.deltas(adapter_name).get(name)
            if delta is not None and not delta.pending:
                found[f"{module}.{name}"] = _fingerprint(parameter, _spread(delta.indices))
            elif name == "weight" and layer.pair(adapter_name) is not None and parameter.numel():
                found[f"{module}.{name}"] = _fingerprint(parameter, _spread(range(parameter.numel())))
    return found


def check_base(layers: Mapping[str, SamLayer], kept: Mapping[str, str], strict: bool) -> None:
    """Warn if the base values differ from those that the fingerprints tell, as far as they can be read.

    Values of different dtypes are equal if they agree as far as the coarser one tells.

    Raises:
        ValueError: with `strict`, instead of the warning; or if a fingerprint is damaged.
    """
    shares, compared, others = [], 0, 0
    for module, layer in layers.items():
        pairs = [(f"{module}.{name}", parameter) for name, parameter in _readable(layer).items()]
        results = [_compare(name, kept[name], parameter) for name, parameter in pairs if name in kept]
        different, total = sum(r[0] for r in results), sum(r[1] for r in results)
        compared, others = compared + bool(total), others + different
        if different:
            shares.append((different / total, module))
    if not shares:
        return
    shown = ", ".join(f"{module!r} ({share:.0%})" for share, module in shares[:SHOWN])
    message = (
        f"the base model is not the one that the adapter was made for: {len(shares)} of {compared} layers have "
        f"other values at the selected places: {shown}{', …' if len(shares) > SHOWN else ''}. The percentages are the "
        "shares of differing entries. Load the base model, and the revision, that adapter_config.json names"
        f"{'' if strict else ' (strict_base=True makes this an error)'}"
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, OtherBaseWarning, stacklevel=2)


def _readable(layer: SamLayer) -> dict[str, Tensor]:
    own = {} if layer.merged else stored_parameters(layer.get_base_layer())
    return {name: parameter.detach() for name, parameter in own.items() if is_plain(parameter)}


def _positions_dtype(numel: int) -> str:
    return "<u4" if numel <= 2**32 else "<u8"


def _spread(places: Tensor | range) -> Tensor:
    """Some of the places, evenly spread over them."""
    ranks = torch.linspace(0, len(places) - 1, min(ENTRIES, len(places)), dtype=torch.float64).long()
    return ranks if isinstance(places, range) else places[ranks.to(places.device)]


def _fingerprint(parameter: Tensor, positions: Tensor) -> str:
    values = parameter.take(positions.to(parameter.device)).cpu()
    places = positions.cpu().numpy().astype(_positions_dtype(parameter.numel())).tobytes()
    text = base64.b64encode(places + values.view(torch.uint8).numpy().tobytes()).decode()
    return f"{str(parameter.dtype).removeprefix('torch.')} {text}"


def _compare(name: str, kept: str, parameter: Tensor) -> tuple[int, int]:
    """The number of entries that differ, and of those compared."""
    positions, values = _read(name, kept, parameter.numel())
    here = parameter.take(positions.to(parameter.device)).cpu()
    if here.dtype == values.dtype:
        return int((here.view(torch.uint8) != values.view(torch.uint8)).view(len(here), -1).any(1).sum()), len(here)
    coarser = max(torch.finfo(here.dtype), torch.finfo(values.dtype), key=lambda info: info.eps)
    least = max(torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps for tensor in (here, values))
    near = torch.isclose(here.double(), values.double(), rtol=coarser.eps, atol=least, equal_nan=True)
    return int((~near).sum()), len(here)


def _read(name: str, kept: str, numel: int) -> tuple[Tensor, Tensor]:
    dtype, _, text = kept.partition(" ")
    try:
        raw = base64.b64decode(text, validate=True)
        places = np.dtype(_positions_dtype(numel))
        entries = len(raw) // (places.itemsize + DTYPES[dtype].itemsize)
        positions = np.frombuffer(raw, places, entries)
        values = torch.frombuffer(bytearray(raw[entries * places.itemsize :]), dtype=DTYPES[dtype])
        right = 0 < entries == len(values) and int(positions.max()) < numel
    except (KeyError, ValueError, binascii.Error):
        right = False
    if not right:
        raise ValueError(f"adapter_config.json has a damaged fingerprint for {name!r}: {kept[:60]!r}.")
    return torch.from_numpy(positions.astype(np.int64)), values
