"""The table of methods, and how a method with options is written: `name:key=value,key=value`."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.rig.adapters import BitFit, Full, Hybrid, Lora, Shira, Sparse, Supertuning
from benchmarks.rig.diffpruning import DiffPruning
from benchmarks.rig.method import Method

# A new method is one row.
METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "random": partial(Sparse, score="random"),
    "bitfit": BitFit,
    "magnitude": partial(Sparse, score="magnitude"),
    "lora": Lora,
    "diffpruning": DiffPruning,
    "sam": Sparse,
    "sam_tensor": partial(Sparse, budget="tensor"),
    "sam_curvature": partial(Sparse, score="sam_curvature"),
    "movement": partial(Sparse, score="movement", max_batches=200),
    "shira": Shira,
    "supertuning": Supertuning,
    "hybrid": Hybrid,
}
# Options that every method has: they change the run around it.
OF_THE_RUN: dict[str, Any] = {
    "density": None,  # p of this method; the run's by default
    "candidates": None,  # "linear" or "all"; the run's by default
    "head_warmup": 0,  # steps in which the head alone is trained, before the method starts
}


@dataclass(frozen=True)
class Spec:
    """A method and its options; `text` is the same for the same options in any order."""

    name: str
    options: dict[str, Any]
    of_the_run: dict[str, Any]

    @property
    def text(self) -> str:
        """How it is written."""
        every = sorted({**self.options, **self.of_the_run}.items())
        return self.name + ":" * bool(every) + ",".join(f"{key}={_written(value)}" for key, value in every)

    def make(self) -> Method:
        """The method."""
        return METHODS[self.name](**self.options)


def parse(text: str) -> Spec:
    """`name:key=value,...` as a `Spec`.

    Raises:
        ValueError: for an unknown name or option, or text that is not written so.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"Expected a method of {list(METHODS)}, got {name!r}: choose one of these.")
    known, options, of_the_run = inspect.signature(METHODS[name]).parameters, {}, {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in {*known, *OF_THE_RUN}:
            raise ValueError(f"Expected key=value with a key of {[*known, *OF_THE_RUN]} in {text!r}, got {part!r}.")
        (of_the_run if key in OF_THE_RUN else options)[key] = _read(value)
    return Spec(name, options, of_the_run)


def canonical(text: str) -> str:
    """A method as `Spec.text` writes it.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        return parse(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read(value: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return words[value]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
