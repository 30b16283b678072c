"""Batches in which each sample has an adapter of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_sam._peft import AuxiliaryTrainingWrapper

# The name, in `adapter_names`, of the model without any adapter (PEFT's).
BASE = "__base__"
# what models call the input that has the batch in its first dimension, the likeliest first; and sequences
BATCHES = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "input_features",
    "input_values",
    "pixel_values",
    "inputs",
)
SEQUENCES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
# what is written to, or belongs to the whole batch
CACHES = ("past_key_values", "use_cache", "cache_params", "encoder_outputs")
# embeddings of absolute positions, which all samples share
POSITIONS = re.compile(r"^(?!.*rel).*pos|^wpe$")
# modules that are called with the tokens that a router sends them
EXPERTS = re.compile("experts?")


def check_samples(names: Sequence[str], known: Iterable[str], training: bool) -> None:
    """Whether samples can have these adapters.

    Raises:
        ValueError: if an adapter does not exist, or the model is in train mode.
    """
    if unknown := sorted(set(names) - {*known, BASE}):
        raise ValueError(f"adapter_names has {unknown}; the adapters are {sorted(known)}, and {BASE!r} for none.")
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")


@contextmanager
def adapters_by_sample(layers: Mapping[str, Any], call: Samples) -> Iterator[None]:
    """Give each sample of a batch its adapter, in the sparse layers, in heads of modules_to_save and in trained rows.

    Raises:
        ValueError: if adapters are merged.
    """
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )

    def named(head: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = head._get_available_adapters()  # type: ignore[operator]
        return args, {**kwargs, "adapter_names": [name if name in own else BASE for name in call.names_of_rows()]}

    model = call.model
    heads = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [head.register_forward_pre_hook(named, with_kwargs=True) for head in heads]
    handles.append(model.register_forward_pre_hook(call.begin, with_kwargs=True))
    handles.append(model.register_forward_hook(call.end, always_call=True))
    encoder = model.get_encoder() if isinstance(model, PreTrainedModel) else model
    if isinstance(encoder, nn.Module) and encoder is not model:  # which generate calls by itself
        handles.append(encoder.register_forward_pre_hook(call.begin, with_kwargs=True))
    for name, layer in layers.items():
        layer.sample_adapters, layer.sample_names = partial(call.forward, name), call.names
    try:
        yield
    finally:
        for layer in layers.values():
            layer.sample_adapters, layer.sample_names = None, ()
        for handle in handles:
            handle.remove()


class Samples:
    """The adapter of each sample, and what is known of the model's call that is running.

    Attributes:
        names: one adapter for each sample of the batch.
        rows: of the batch in this call, a multiple of the names: beam search makes several rows of a sample, which lie
            next to each other.
        lengths: of the sequences that the call has.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.model, self.names = model, names
        self.rows, self.lengths = len(names), set[int]()
        self._know(args, kwargs)
        if self.rows != len(names):
            raise self._other_length()
        # layer → whether the first dimension of what it is called with grows with the batch, for each of its calls
        self._grows: dict[str, list[bool]] | None = None
        self._trial: dict[str, list[int]] | None = None
        self._inside = False

    def names_of_rows(self) -> list[str]:
        """The names as heads take them, one for each row; in a trial, of a row less."""
        rows = self.rows if self._trial is None else self.rows - 1
        return [self.names[row * len(self.names) // self.rows] for row in range(rows)]

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Look at what the model, or its encoder alone, is called with.

        Where the batch is as large as the sequences are long, or these are not known, as those of an image, shapes do
        not tell them apart. Then a trial with a row less shows what grows with the batch.
        """
        if self._inside:
            return
        self._know(args, kwargs)
        self._grows = None
        if len(set(self.names)) > 1 and (not self.lengths or self.rows in self.lengths):
            self._grows = self._try(model, args, kwargs)
        self._inside = model is self.model

    def end(self, *_: Any) -> None:
        """The model's call is over."""
        self._inside = False

    def _try(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, list[bool]]:
        fewer = {name: _without_last_row(name, value, self.rows) for name, value in kwargs.items()}
        self._inside, self._trial = True, {}
        try:
            with torch.no_grad():
                model.forward(
                    *(_without_last_row("", value, self.rows) for value in args),
                    **{name: value for name, value in fewer.items() if name not in CACHES},
                )
            return {path: [n == self.rows - 1 for n in found] for path, found in self._trial.items()}
        except Exception as error:
            raise ValueError(
                f"adapter_names: the shapes of the inputs do not tell the batch, {self.rows} samples, from the "
                f"sequences, and a trial with a sample less failed ({error!r}). Pad the sequences to another length."
            ) from error
        finally:
            self._inside, self._trial = False, None

    def _know(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim}
        given = [tensors[name] for name in BATCHES if name in tensors]
        given = given or [value for value in args if isinstance(value, Tensor) and value.ndim] or list(tensors.values())
        if not given:
            return
        self.rows = len(given[0])
        if self.rows % len(self.names) or not self.rows:
            raise self._other_length()
        self.lengths = {t.shape[1] for name, t in tensors.items() if name in SEQUENCES and t.ndim > 1}

    def _other_length(self) -> ValueError:
        return ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {self.rows} respectively."
        )

    def forward(self, path: str, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a sparse layer gives: to each sample what its adapter does.

        Raises:
            ValueError: if the adapters differ there and the layer's input is not one tensor that has the batch in its
                first dimension.
        """
        if not any(layer.reached_by(name) for name in set(self.names)):
            return layer.base_layer(*args, **kwargs)
        if len(set(self.names)) == 1:
            return layer.forward_as(self.names[0], *args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ValueError(f"adapter_names is for modules of one tensor, which {path!r} ({_kind(layer)}) is not.")
        x = args[0]
        if self._trial is not None:
            self._trial.setdefault(path, []).append(len(x) if x.ndim else 0)
            return layer.base_layer(x)
        return by_samples(self.names, self._batch(path, layer, x), layer.forward_as)

    def _batch(self, path: str, layer: Any, x: Tensor) -> Tensor:
        """The input of a layer, samples in the first dimension."""
        n = len(x) if x.ndim else 0
        one_row = n == 1 and x.ndim == 2 and not x.is_floating_point()
        if one_row and POSITIONS.search(path.rpartition(".")[2]):
            return x.expand(self.rows, -1)  # as the sum with the other embeddings would do
        tokens = x.ndim == 2 and x.is_floating_point() and any(n == self.rows * length for length in self.lengths)
        right = n == self.rows or tokens
        if self._grows is not None and n == self.rows:
            calls = self._grows.get(path, [])
            right = bool(calls) and calls.pop(0)
        if not right or any(EXPERTS.fullmatch(part) for part in path.split(".")):
            raise ValueError(
                f"adapter_names needs the batch, {self.rows} samples, in the first dimension of what a module is "
                f"called with; {path!r} ({_kind(layer)}) is called with a tensor of shape {tuple(x.shape)}, whose "
                "first dimension is another. Leave the module out with exclude_modules, or give all samples of a "
                "batch one adapter."
            )
        return x


def _kind(layer: Any) -> str:
    return type(layer.get_base_layer()).__name__


def _without_last_row(name: str, value: Any, rows: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
        return value
    return value if value.ndim == 1 and "position" in name else value[:-1]


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
