"""`SamConfig`: what a user says about a sparse adapter."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from peft.config import PeftConfig

from peft_sam._peft import SAM_SPARSE
from peft_sam.recorded import FORMAT, LARGEST, check_selection, counts_of, fingerprints_of, shown
from peft_sam.scores import BUDGETS, SCORES

# how the curvature is estimated → the statistic of the pass that it is made from
CURVATURES = {"fisher": "squared_gradient", "hutchinson": "hessian"}
SHORTHANDS = ("all-linear", "all")
# fields that are lists of names
LISTS = ("modules_to_save", "target_parameters")
SAVE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class SamConfig(PeftConfig):
    """Configuration of a SAM sparse adapter.

    SAM here is the Second-order Approximation Method of Fu et al. 2022 (https://arxiv.org/abs/2211.15583): train only
    the ⌊p·m⌋ entries of a pretrained model with the largest squared gradient of the task's mean loss. It has nothing to
    do with sharpness-aware minimisation, nor with Segment Anything and its `transformers.SamConfig`.

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
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names or name endings of parameters that are candidates besides, such as the fused weights of "
            "experts, 'experts.down_proj'. With target_modules=[] they are the only ones."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, name endings or a regular expression of modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved densely besides the adapter, such as the head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Rows of the word embeddings that are trained and saved densely besides the adapter, such as those "
            "of new tokens: their numbers, or module name → numbers. What is tied to the embeddings follows."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "Whether a word embedding in `modules_to_save` or `trainable_token_indices` stays tied to the "
            "layers that it is tied to. A target always does: its one delta is seen by all uses of the parameter."
        },
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
    r: int | None = field(
        default=None,
        metadata={
            "help": "Rank of a pair B·A, as LoRA's, trained beside the delta of each linear layer's weight, where that "
            "is tied to no other; None for none."
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "α: a pair changes the weight by α/r · B·A. None for 2 r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of a pair's inputs that training drops."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the scores 'random' and 'bias' and of Hutchinson's probes."}
    )
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
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "The dtype of the values in adapter files; None for the one they have."}
    )
    strict_base: bool = field(
        default=False,
        metadata={
            "help": "Whether loading an adapter onto a base with other values than the one it was made for is an "
            "error, not a warning. Belongs to whoever loads: it is not saved."
        },
    )
    selection: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "What was selected (entries per parameter and their origin). Filled in; do not set."},
    )

    # whether the adapter's targets name word embeddings that are tied in its model: told by the tuner
    names_tied = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SAM_SPARSE
        self._check()
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.r
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's convention
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _check(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
            _check_names(name, getattr(self, name))
        _check_tokens(self.trainable_token_indices)
        for name in ("fan_in_fan_out", "absolute_damping", "init_weights", "strict_base", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {shown(getattr(self, name))}.")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, os.PathLike, type(None))):
                raise ValueError(f"{name} must be None or a text; got {shown(getattr(self, name))}.")
        layers = self.layers_to_transform
        if not all(type(index) is int for index in (layers if isinstance(layers, (list, tuple)) else [layers or 0])):
            raise ValueError(
                f"layers_to_transform must be None, an integer or a list of integers; got {shown(layers)}."
            )
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ValueError(f"density is the share of entries to train, 0 < density <= 1; got {shown(self.density)}.")
        if not isinstance(self.score, str) or self.score not in SCORES:
            raise ValueError(f"score must be one of {sorted(SCORES)}; got {shown(self.score)}.")
        if not isinstance(self.budget, str) or self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {list(BUDGETS)}; got {shown(self.budget)}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < LARGEST:
            raise ValueError(f"seed must be a non-negative integer; got {shown(self.seed)}.")
        if not isinstance(self.curvature, str) or self.curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {sorted(CURVATURES)}; got {shown(self.curvature)}.")
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or not 1 <= self.probes < LARGEST:
            raise ValueError(f"probes must be a positive integer; got {shown(self.probes)}.")
        if isinstance(self.damping, bool) or not isinstance(self.damping, (int, float)) or not 0 < self.damping < inf:
            raise ValueError(f"damping must be a positive number; got {shown(self.damping)}.")
        self._check_pairs()
        regex = isinstance(self.target_modules, str) and self.target_modules not in SHORTHANDS
        if regex and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform does not work with a regular expression in target_modules "
                f"({shown(self.target_modules)}): name the layers in the expression, or give target_modules as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={shown(self.layers_pattern)} needs layers_to_transform, which says which layers it is."
            )
        if not isinstance(self.save_dtype or "", str) or self.save_dtype not in (None, *SAVE_DTYPES):
            raise ValueError(f"save_dtype must be None or one of {list(SAVE_DTYPES)}; got {shown(self.save_dtype)}.")
        if self.selection is not None:
            check_selection(self.selection)

    def _check_pairs(self) -> None:
        r, alpha, dropout = self.r, self.lora_alpha, self.lora_dropout
        if r is not None and (isinstance(r, bool) or not isinstance(r, int) or not 1 <= r < LARGEST):
            raise ValueError(f"r is the rank of low-rank pairs, a positive integer, or None for none; got {shown(r)}.")
        if alpha is not None and (
            isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < LARGEST
        ):
            raise ValueError(f"lora_alpha must be a positive number, or None for 2 * r; got {shown(alpha)}.")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout is a share, 0 <= lora_dropout < 1; got {shown(dropout)}.")
        if r is None and (alpha is not None or dropout):
            raise ValueError(
                f"lora_alpha={shown(alpha)} and lora_dropout={shown(dropout)} are of low-rank pairs, and r=None asks "
                "for none: set r, or leave them out."
            )

    def for_one_adapter(self) -> SamConfig:
        """A copy that an adapter can fill in, so that one config makes many adapters."""
        found = copy.copy(self)
        if self.modules_to_save is not None:
            found.modules_to_save = list(dict.fromkeys(self.modules_to_save))  # PEFT adds the same heads each time
        return found

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

    @property
    def fingerprints(self) -> dict[str, str]:
        """What is kept of the base model that the adapter was made for, per parameter name."""
        return {} if self.selection is None else fingerprints_of(self.selection)

    def record(self, summary: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
        """Fill in `selection`: what was selected, and on which base."""
        self.selection = {**summary, "base": dict(fingerprints), "format": FORMAT}

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Follow the base model's modules, which have got other names since, in what is recorded and in the targets."""
        counts, base = self.counts or {}, self.fingerprints
        if self.selection is None or all(renamed(name) == name for name in (*counts, *base)):
            return
        counts, base = {renamed(n): number for n, number in counts.items()}, {renamed(n): t for n, t in base.items()}
        self.selection = {**self.selection, "counts": counts, "base": base}
        if isinstance(self.target_modules, str):
            self.target_modules = {name.rpartition(".")[0] for name in (*counts, *base)}  # type: ignore[assignment]
        elif self.target_modules is not None:
            self.target_modules = {renamed(name) for name in self.target_modules}  # type: ignore[assignment]
        if isinstance(self.exclude_modules, set):
            self.exclude_modules = {renamed(name) for name in self.exclude_modules}

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        found = super().to_dict()
        del found["strict_base"]
        if found["selection"] is not None:
            found["selection"]["format"] = FORMAT
        return found


def _check_tokens(value: Any) -> None:
    named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    for numbers in value.values() if named else [] if value is None else [value]:
        if not isinstance(numbers, (list, tuple)) or not all(type(n) is int and 0 <= n < LARGEST for n in numbers):
            raise ValueError(
                "trainable_token_indices must be None, a list of row numbers from 0, or a map from module name to such "
                f"a list; got {shown(value)}."
            )


def _check_names(field_name: str, value: Any) -> None:
    names = value if isinstance(value, (list, tuple, set)) else [value]
    if value is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field_name} must be None, a text or a list of texts; got {shown(value)}.")
    if isinstance(value, str) and field_name in LISTS:
        raise ValueError(f"{field_name} must be None or a list of names; got {shown(value)}.")
    if isinstance(value, str) and field_name != "layers_pattern":
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{field_name} is no regular expression ({error}): {shown(value)}.") from None
