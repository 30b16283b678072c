"""The method's own member in PEFT's closed enum of types, and what tells its configs and its tuner."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType

from peft_sam._peft.names import PEFT_TYPE_TO_TUNER_MAPPING


def _add_member(name: str) -> PeftType:
    """Add a real member `name` to PEFT's closed enum of types, or return the one that is there.

    A plain string in its place would break `.value`; a member entered in the enum's own maps passes lookup by
    value, name and attribute, JSON, deepcopy and pickle.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


SAM_SPARSE = _add_member("SAM_SPARSE")


def is_sparse(config: Any) -> bool:
    """Whether a config, or what stands in its place, is of this package's type."""
    return getattr(config, "peft_type", None) == SAM_SPARSE


def tuner() -> Any:
    """The tuner that is registered for the type."""
    return PEFT_TYPE_TO_TUNER_MAPPING[SAM_SPARSE]
