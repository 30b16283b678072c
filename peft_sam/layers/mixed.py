"""Batches in which each sample has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

# The name, in `adapter_names`, of the model without any adapter (PEFT's).
BASE = "__base__"


def check_samples(names: Sequence[str], known: Iterable[str], training: bool) -> None:
    """Whether samples can have these adapters.

    Raises:
        ValueError: if an adapter does not exist, or the model is in train mode.
    """
    if unknown := sorted(set(names) - {*known, BASE}):
        raise ValueError(f"adapter_names has {unknown}; the adapters are {sorted(known)}, and {BASE!r} for none.")
    if training:
        raise ValueError("adapter_names is for inference: call model.eval() first.")


@contextmanager
def adapters_by_sample(model: nn.Module, layers: Iterable[Any], names: Sequence[str]) -> Iterator[None]:
    """Give each sample of a batch its adapter, in the sparse layers and in the heads of modules_to_save.

    Raises:
        ValueError: if adapters are merged.
    """
    layers = list(layers)
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names needs unmerged adapters: call model.unmerge_adapter() first.")

    def named(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": list(names)}

    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    handles = [head.register_forward_pre_hook(named, with_kwargs=True) for head in heads]
    for layer in layers:
        layer.sample_adapters = list(names)
    try:
        yield
    finally:
        for layer in layers:
            layer.sample_adapters = None
        for handle in handles:
            handle.remove()


def by_samples(names: Sequence[str], x: Tensor, run: Callable[[str, Tensor], Tensor]) -> Tensor:
    """`run(name, its samples)` for each name, put together in the order of the samples.

    Args:
        names: one per sample; where beam search has made several rows of a sample, they lie next to each other.
        x: samples in the first dimension.

    Raises:
        ValueError: if the samples are not as many as the names, or a multiple of that.
    """
    copies, odd = divmod(len(x), len(names))
    if odd or not copies:
        raise ValueError(f"adapter_names has {len(names)} names for a module's batch of {len(x)} samples.")
    y: Tensor | None = None
    for name in dict.fromkeys(names):
        samples = torch.tensor([i for i in range(len(x)) if names[i // copies] == name], device=x.device)
        part = run(name, x.index_select(0, samples))
        if y is None:
            y = part.new_zeros(len(x), *part.shape[1:])
        y = y.index_copy(0, samples, part)
    assert y is not None
    return y
