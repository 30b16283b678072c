"""What adapter_config.json says of a selection, under `selection`: checked, since it may come from a stranger.

What is said there goes into the model cards of everybody who trains on, so texts are single words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from reprlib import Repr
from typing import Any

# of adapter files: 1 has the support as integers, 2 as a code
FORMAT = 2
# what numbers of entries, batches and steps stay below, with room
LARGEST = 2**63
LONGEST_NAME = 1000
COUNTED = ("k", "m", "batches", "head_warmup_steps", "excluded")
MEASURED = ("density", "threshold", "share", "samples", "seconds")
WORD = re.compile(r"[A-Za-z0-9_.+:-]{1,64}")

_repr = Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 60
_repr.maxlevel = 2


def shown(value: Any) -> str:
    """A value of any size and depth for an error message: short."""
    return _repr.repr(value)


def check_selection(selection: Any) -> None:
    """Check all that a config says of a selection.

    Raises:
        ValueError: names the field, what it holds and what was expected.
    """
    counts, others = counts_of(selection), set(selection) - {"counts", "base", "format"}
    format_of(selection)
    fingerprints_of(selection)
    for name in sorted(map(str, others)):
        value = selection.get(name)
        if name in COUNTED:
            right, expected = type(value) is int and 0 <= value < LARGEST, "a number of things, from 0"
        elif name in MEASURED:
            share = name == "share"
            right = _is_number(value) and value >= 0 and (value <= 1 or not share)
            expected = "a share, from 0 to 1" if share else "a finite number, from 0"
        elif isinstance(value, str):
            right, expected = WORD.fullmatch(value) is not None, "a word of up to 64 letters and digits"
        else:  # of a newer version
            right, expected = value is None or isinstance(value, bool) or _is_number(value), "a word or a number"
        if not right or not WORD.fullmatch(name):
            raise ValueError(f"the field `selection` of a SamConfig has {shown(name)}: {shown(value)}; {expected}.")
    if "k" in others and selection["k"] != sum(counts.values()):
        raise ValueError(
            f"the field `selection` of a SamConfig has k = {selection['k']} entries in all and {sum(counts.values())} "
            "under 'counts'."
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return abs(value) < LARGEST if isinstance(value, int) else isinstance(value, float) and isfinite(value)


def counts_of(selection: Any) -> dict[str, int]:
    """The entries per parameter in a config's `selection`: checked."""
    counts = selection.get("counts") if isinstance(selection, Mapping) else None
    if not isinstance(counts, Mapping) or not counts:
        raise ValueError(
            "the field `selection` of a SamConfig must hold 'counts', a map from parameter name to entries; got "
            f"{shown(selection)}. It is filled in by select_parameters; leave it None."
        )
    for name, count in counts.items():
        named = isinstance(name, str) and len(name) <= LONGEST_NAME
        if not named or type(count) is not int or not 1 <= count < LARGEST:
            raise ValueError(
                f"the field `selection` of a SamConfig gives {shown(count)} entries for parameter {shown(name)}; "
                "expected a positive integer for a parameter name."
            )
    return dict(counts)


def format_of(selection: Mapping[str, Any]) -> int:
    """The format of the file that a config's `selection` describes: checked."""
    found = selection.get("format", 1)
    if type(found) is not int or found < 1:
        raise ValueError(f"the field `selection` of a SamConfig has format {shown(found)}; expected 1 to {FORMAT}.")
    if found > FORMAT:
        raise ValueError(
            f"this adapter has file format {shown(found)}, and this peft_sam knows 1 to {FORMAT}: upgrade it (pip "
            "install -U peft-sam)."
        )
    return found


def fingerprints_of(selection: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints in a config's `selection`: checked."""
    found = selection.get("base", {})
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(
            "the field `selection` of a SamConfig must hold under 'base' a map from parameter name to text; got "
            f"{shown(found)}."
        )
    return dict(found)
