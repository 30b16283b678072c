"""`Selection`: which entries of which parameters were chosen, and where that came from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_sam.sparse.support import check_support

METADATA_KEY = "peft_sam.selection"
# no parameter has so many entries
LARGEST = 2**63
NUMBERS = ("density", "threshold", "samples", "batches", "seconds", "head_warmup_steps", "share", "excluded")


@dataclass
class Selection:
    """The support of a sparse adapter over all candidate parameters.

    Attributes:
        indices: candidate parameter name → its selected flat row-major positions (int64, strictly increasing, CPU),
            in the order of the base model's `named_parameters()`; empty where nothing was selected.
        shapes: candidate parameter name → shape; the m candidate entries.
        score, budget, density: as in `SamConfig`.
        threshold: the smallest selected score ("global"), or the smallest of the tensors' thresholds ("tensor").
        share: Σ|g| of the selected entries over Σ|g| of all candidates, g the gradient of the pass, to four digits:
            what of a full fine-tuning's first steps falls on them. Of "fisher" with √(mean g_b²) in place of |g|, of
            "movement" with how far an entry moved, and without data k / m. 0 if it was not recorded.
        samples: so many units (examples, target tokens, pixels) whose mean loss was differentiated; 0 without data.
        excluded: so many candidates were left alone, as those of other adapters.
        unit: "samples", "tokens" or "pixels".
        batches, seconds: extent of the pass over the data.
        head_warmup_steps: for so many steps the head was trained alone before the pass.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, torch.Size]
    score: str
    budget: str
    density: float
    threshold: float
    samples: float = 0.0
    batches: int = 0
    seconds: float = 0.0
    head_warmup_steps: int = 0
    share: float = 0.0
    excluded: int = 0
    unit: str = "samples"

    def __post_init__(self) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in self.shapes.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Selected entries per parameter, of those that have any."""
        return {name: len(indices) for name, indices in self.indices.items() if len(indices)}

    @property
    def k(self) -> int:
        """Number of selected entries."""
        return sum(self.counts.values())

    @property
    def m(self) -> int:
        """Number of candidate entries."""
        return sum(shape.numel() for shape in self.shapes.values())

    def summary(self) -> dict[str, Any]:
        """What goes into adapter_config.json: everything but the positions."""
        return {
            "k": self.k,
            "m": self.m,
            "score": self.score,
            "budget": self.budget,
            "density": self.density,
            "threshold": self.threshold,
            "share": self.share,
            "samples": self.samples,
            "unit": self.unit,
            "batches": self.batches,
            "seconds": round(self.seconds, 3),
            "head_warmup_steps": self.head_warmup_steps,
            "excluded": self.excluded,
            "counts": self.counts,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.k:,} of {self.m:,} entries (density {self.density:g}, budget {self.budget!r}), score "
            f"{self.score!r} >= {self.threshold:.3g}",
        ]
        if self.batches:
            lines.append(f"from {self.samples:,.0f} {self.unit} in {self.batches} batches, {self.seconds:.1f} s")
        if self.batches and self.share:
            of = "movement" if self.score == "movement" else "gradient"
            lines.append(f"with {self.share:.2%} of the {of} of all candidates")
        if self.head_warmup_steps:
            lines.append(f"after {self.head_warmup_steps} steps of training the head alone")
        if self.excluded:
            lines.append(f"without {self.excluded:,} entries that were excluded")
        counts = self.counts
        width = max((len(name) for name in counts), default=0)
        for name in sorted(counts, key=lambda name: -counts[name])[:10]:
            share = counts[name] / self.shapes[name].numel()
            lines.append(f"  {name:<{width}} {counts[name]:>10,}  {share:8.3%}")
        if len(counts) > 10:
            lines.append(f"  ... {len(counts) - 10} more parameters")
        if untouched := len(self.shapes) - len(counts):
            lines.append(f"  no entry in {untouched} of {len(self.shapes)} candidate parameters")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Selection(k={self.k}, m={self.m}, score={self.score!r}, budget={self.budget!r})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection to one safetensors file."""
        about = {key: getattr(self, key) for key in ("score", "budget", "unit", *NUMBERS)}
        about["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        save_file({n: i.contiguous() for n, i in self.indices.items()}, path, {METADATA_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read a selection that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or is no selection.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no selection file at {os.fspath(path)!r}")
        try:
            about = json.loads(read_metadata(path))
            with safe_open(path, framework="pt") as file:
                shapes = about.pop("shapes")
                indices = {name: file.get_tensor(name) for name in shapes}
            selection = cls(indices, shapes, **about)
            numbers = [getattr(selection, name) for name in NUMBERS]
            if not all(isinstance(number, (int, float)) for number in numbers) or selection.share > 1:
                raise TypeError(f"expected numbers, the share at most 1; got {numbers}")
            texts = (selection.score, selection.budget, selection.unit, *shapes)
            if not all(isinstance(text, str) and text.isprintable() for text in texts):
                raise TypeError("expected names of printable letters")  # they are printed
            if not all(size >= 0 and shape.numel() < LARGEST for shape in selection.shapes.values() for size in shape):
                raise TypeError("expected shapes of parameters")
        except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a selection file, or a damaged one ({type(error).__name__}: {error}); "
                "expected a file written by Selection.save."
            ) from error
        for name, support in indices.items():
            check_support(support, selection.shapes[name].numel(), name)
        return selection


def read_metadata(path: str | os.PathLike[str]) -> str:
    """What a selection file says about itself, as JSON.

    Raises:
        KeyError: if it says nothing.
    """
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {})[METADATA_KEY]
