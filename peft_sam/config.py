"""`SamConfig`: what a user says about a sparse adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from peft.config import PeftConfig

from peft_sam._peft import SAM_SPARSE
from peft_sam.scores import SCORES

BUDGETS = ("global", "tensor")
# how the curvature is estimated → the statistic of the pass that it is made from
CURVATURES = {"fisher": "squared_gradient", "hutchinson": "hessian"}
SHORTHANDS = ("all-linear", "all")


@dataclass
class SamConfig(PeftConfig):
    """Configuration of a SAM sparse adapter.

    SAM here is the Second-order Approximation Method of Fu et al. 2022 (arXiv 2211.15583): train only the ⌊p·m⌋
    entries of a pretrained model with the largest squared gradient of the task's mean loss. It has nothing to do
    with sharpness-aware minimisation, nor with Segment Anything and its `transformers.SamConfig`.

    Raises:
        ValueError: at construction, for a value out of range or options that contradict each other.
    """

    density: float = field(
        default=0.005, metadata={"help": "p, the share of the candidate entries that is trained: 0 < p ≤ 1."}
    )
    score: str = field(
        default="sam", metadata={"help": f"What an entry is worth; one of {', '.join(map(repr, SCORES))}."}
    )
    budget: Literal["global", "tensor"] = field(
        default="global",
        metadata={"help": "'global': k = ⌊p·m⌋ over all candidates together; 'tensor': ⌊p·n⌋ of each tensor."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules whose parameters are candidates: None for every linear layer but the head, a list of "
            "names or name endings, a regular expression, 'all-linear', or 'all' for every module that owns "
            "parameters."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, name endings or a regular expression of modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved densely besides the adapter, such as the head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that are targeted; None for all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that `layers_to_transform` counts in."}
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={
            "help": "Set when the targets store their weight as (in, out). Only PEFT's convention: transformers' "
            "Conv1D is recognised by its type."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the score 'random' and of Hutchinson's probes."})
    curvature: Literal["fisher", "hutchinson"] = field(
        default="fisher",
        metadata={
            "help": "What the score 'sam_curvature' takes for the Hessian's diagonal h: 'fisher', the mean of squared "
            "micro-batch gradients, for one backward pass; 'hutchinson', the mean of v ⊙ Hv over random signs v, for "
            "one more backward pass through the gradient per probe."
        },
    )
    probes: int = field(default=4, metadata={"help": "Hutchinson's number of random vectors v."})
    damping: float = field(
        default=0.1,
        metadata={
            "help": "Added to |h|, so that entries with almost no curvature do not win by that alone: as a share of "
            "the mean of |h| over all candidates, so that it means the same for every loss and model."
        },
    )
    absolute_damping: bool = field(
        default=False, metadata={"help": "Whether `damping` is the number that is added itself, not a share."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: deltas start at zero. False: small random deltas, for tests only."},
    )
    selection: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "What was selected (entries per parameter and their origin). Filled in; do not set."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SAM_SPARSE
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's convention
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check()

    def _check(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ValueError(f"density is the share of entries to train, 0 < density <= 1; got {self.density!r}.")
        if not isinstance(self.score, str) or self.score not in SCORES:
            raise ValueError(f"score must be one of {sorted(SCORES)}; got {self.score!r}.")
        if not isinstance(self.budget, str) or self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {list(BUDGETS)}; got {self.budget!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a non-negative integer; got {self.seed!r}.")
        if not isinstance(self.curvature, str) or self.curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {sorted(CURVATURES)}; got {self.curvature!r}.")
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"probes must be a positive integer; got {self.probes!r}.")
        if isinstance(self.damping, bool) or not isinstance(self.damping, (int, float)) or not 0 < self.damping < inf:
            raise ValueError(f"damping must be a positive number; got {self.damping!r}.")
        regex = isinstance(self.target_modules, str) and self.target_modules not in SHORTHANDS
        if regex and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform does not work with a regular expression in target_modules "
                f"({self.target_modules!r}): name the layers in the expression, or give target_modules as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, which says which layers to take."
            )
        if self.selection is not None:
            counts_of(self.selection)

    @property
    def needs_data(self) -> bool:
        """Whether the score needs a pass over data; if not, `get_peft_model` selects by itself."""
        return bool(self.statistics)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the pass over the data accumulates for the score."""
        needed = SCORES[self.score].statistics
        return tuple(CURVATURES[self.curvature] if name == "curvature" else name for name in needed)

    @property
    def counts(self) -> dict[str, int] | None:
        """Selected entries per parameter name of the base model, or None while nothing is selected."""
        return None if self.selection is None else counts_of(self.selection)


def counts_of(selection: Any) -> dict[str, int]:
    """The entries per parameter in a config's `selection`, which may come from a stranger's file: checked."""
    counts = selection.get("counts") if isinstance(selection, Mapping) else None
    if not isinstance(counts, Mapping) or not counts:
        raise ValueError(
            "the field `selection` of a SamConfig must hold 'counts', a map from parameter name to entries; got "
            f"{str(selection)[:200]!r}. It is filled in by select_parameters; leave it None."
        )
    for name, count in counts.items():
        if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"the field `selection` of a SamConfig gives {count!r} entries for parameter {name!r}; expected a "
                "positive integer for a parameter name."
            )
    return dict(counts)
