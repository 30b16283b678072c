"""What a batch counts: over how many samples, or target tokens, its loss is a mean.

Labels say it, but for what a loss makes of them: a causal model leaves out the first of each row, whatever its class is
called and whatever is around it. The loss itself is asked: does it change when these labels do?
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_sam.choosing.before import random_states_as_before

IGNORED_LABEL = -100
# What the labels of a batch are, by their dimensions.
UNITS = {1: "samples", 2: "tokens", 3: "pixels"}
# A change of the loss that is smaller than so much of another change is rounding.
ROUNDING = 1e-3


class Counts:
    """How much each batch counts in the mean over all.

    Attributes:
        unit: of what: "samples", "tokens" or "pixels".
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Any], Tensor], count_fn: Callable[[Any], float] | None
    ) -> None:
        """Count by `count_fn`, or else by the labels and by what `loss`, a batch's mean loss, makes of them."""
        self.model, self.loss, self.count_fn = model, loss, count_fn
        self.unit = UNITS[1]
        # what the loss said of the labels at a place
        self.answers: dict[str, bool] = {}
        # all processes run a sharded model together, and not each has a batch to ask about
        self.can_ask = not any(isinstance(parameter, DTensor) for parameter in model.parameters())

    def of(self, batch: Any) -> float:
        """The number of samples of one batch."""
        if self.count_fn is not None:
            return float(self.count_fn(batch))
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.ndim == 0:
            return examples_in(batch)
        if labels.is_floating_point() or self._is_regression(labels) or self._config("ctc_loss_reduction") == "mean":
            return len(labels)
        self.unit = UNITS.get(labels.ndim, UNITS[1])
        if "shift_labels" in batch:
            return int((batch["shift_labels"] != IGNORED_LABEL).sum())
        counts = (labels != IGNORED_LABEL) & (labels != self._config("semantic_loss_ignore_index"))
        for place, there in self._places_left_out(labels, batch):
            if bool((counts & there).any()) and self._leaves_out(place, batch, counts, there):
                counts = counts & ~there
        return int(counts.sum())

    def _places_left_out(self, labels: Tensor, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Where losses of tokens may leave labels out: the first of each row; those that the attention mask hides."""
        if labels.ndim == 2 and labels.shape[1]:
            first = torch.zeros_like(labels, dtype=torch.bool)
            first[:, 0] = True
            yield "first", first
            mask = batch.get("attention_mask")
            if isinstance(mask, Tensor) and mask.shape == labels.shape:
                yield "hidden", mask == 0

    def _leaves_out(self, place: str, batch: Mapping[str, Any], counts: Tensor, there: Tensor) -> bool:
        if place not in self.answers:
            answer = self._ask(batch, counts, there) if self.can_ask else None
            if answer is None:
                return place == "first" and shifts_labels(self.model)
            self.answers[place] = answer
        return self.answers[place]

    def _ask(self, batch: Mapping[str, Any], counts: Tensor, there: Tensor) -> bool | None:
        """Whether the loss stays as it is when labels `there` change, though it changes with others; None: unknown."""
        labels = batch["labels"]
        known = labels[counts].unique()
        others = counts & ~there
        if len(known) < 2 or not bool(others.any()):
            return None
        another = known[(torch.searchsorted(known, labels.clamp(known[0], known[-1])) + 1) % len(known)]
        column = torch.zeros_like(others)
        best = int(others.sum(0).argmax())
        column[:, best] = others[:, best]
        with torch.no_grad(), random_states_as_before(), _evaluating(self.model):
            try:
                now, here, elsewhere = (
                    float(self.loss(_with_labels(batch, labels.where(~changed, another))))
                    for changed in (column & ~column, counts & there, column)
                )
            except Exception:  # a loss that these labels are not for
                return None
        change, control = abs(here - now), abs(elsewhere - now)
        return change <= ROUNDING * control if control > 0 else None

    def _is_regression(self, labels: Tensor) -> bool:
        """Whether the model takes labels for numbers, among which -100 is one."""
        one_each = self._config("num_labels") == 1 and labels.numel() == len(labels)
        return self._config("problem_type") == "regression" or (self._config("problem_type") is None and one_each)

    def _config(self, name: str) -> Any:
        return getattr(getattr(self.model, "config", None), name, None)


def examples_in(batch: Any) -> int:
    """The rows of a batch: the length of a list of examples, else of the first array in it, else of the first list.

    Arrays are tensors or numpy's, at whatever depth. Warns if nothing says how many rows there are.
    """
    if isinstance(batch, list) and _are_examples(batch):
        return len(batch)
    array = next(_inside(batch, lambda part: _is_array(part) and part.ndim > 0), None)
    if array is not None:
        return len(array)
    rows = next(_inside(batch, lambda part: isinstance(part, (list, tuple)) and len(part) > 0), None)
    if rows is not None and not all(isinstance(part, tuple) for part in rows):  # pairs, or a pair of fields?
        return len(rows)
    warnings.warn(
        f"nothing in a batch, a {type(batch).__name__}, says how many examples it has, and each batch counts as one: "
        "pass count_fn, which says it.",
        stacklevel=2,
    )
    return 1


def _are_examples(parts: list[Any]) -> bool:
    """Whether a list holds rows, not fields that have all rows.

    Rows have a number or a text each, or vectors of unequal lengths.
    """
    if not parts or any(isinstance(part, (str, bytes)) for part in parts):
        return False
    rows = [[part] if _is_array(part) else _parts(part) for part in parts]
    single = all(any(map(_is_single, row)) for row in rows)
    return single or any(map(_are_unequal, zip(*rows, strict=False)))


def _are_unequal(column: Sequence[Any]) -> bool:
    vectors = all(_is_array(part) and part.ndim == 1 for part in column)
    return vectors and len({len(part) for part in column}) > 1 and len({part.dtype for part in column}) == 1


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _is_single(value: Any) -> bool:
    return isinstance(value, (str, bytes, bool, int, float)) or (_is_array(value) and value.ndim == 0)


def _parts(value: Any) -> list[Any]:
    """Those of a list, a mapping, or an object with attributes."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return list((value if isinstance(value, Mapping) else getattr(value, "__dict__", {})).values())


def _inside(batch: Any, wanted: Callable[[Any], bool]) -> Iterator[Any]:
    """The parts of a batch that are wanted, each before what it holds."""
    seen, left = set[int](), [batch]
    while left:
        part = left.pop()
        if wanted(part):
            yield part
        if id(part) not in seen and not _is_array(part) and not isinstance(part, (str, bytes)):
            seen.add(id(part))
            left.extend(reversed(_parts(part)))


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model's class is one whose loss compares position i with label i + 1."""
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None or found.config.is_encoder_decoder:
        return False
    return any(
        kind.__name__ in causal or kind.__name__.endswith("ForConditionalGeneration") for kind in type(found).__mro__
    )


def _with_labels(batch: Mapping[str, Any], labels: Tensor) -> Mapping[str, Any]:
    copied: Any = batch.copy() if hasattr(batch, "copy") else dict(batch)
    copied["labels"] = labels
    return copied


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, but for layers of 4-bit weights.

    They behave the same in both, and on CPUs bitsandbytes would rearrange their weights, at their first pass in eval
    mode without gradients, for a kernel that no gradient comes through: neither in the pass nor in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
