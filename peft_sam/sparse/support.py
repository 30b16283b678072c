"""What a support is: the positions of a parameter's entries that change."""

from __future__ import annotations

import torch
from torch import Tensor


def check_support(indices: Tensor, numel: int, name: str) -> None:
    """Check that `indices` is a support in a parameter of `numel` entries.

    A support is a 1-D integer tensor of flat row-major positions, strictly increasing, each in [0, numel).

    Raises:
        ValueError: says what is wrong and where; `name` is the parameter.
    """
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"the support of {name!r} must be a 1-D tensor of 32- or 64-bit integers; got shape "
            f"{tuple(indices.shape)}, {indices.dtype}."
        )
    if len(indices) == 0:
        return
    steps = indices[1:] <= indices[:-1]
    if bool(steps.any()):
        at = int(steps.nonzero()[0]) + 1
        raise ValueError(
            f"the support of {name!r} must be sorted without repeats; entry {at} is {int(indices[at])} after "
            f"{int(indices[at - 1])}."
        )
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= numel:
        raise ValueError(
            f"the support of {name!r} has position {first if first < 0 else last}, outside the parameter, which has "
            f"{numel} entries."
        )
