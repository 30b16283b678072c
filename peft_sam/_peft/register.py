"""Entering the method in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_sam._peft.auto import enter_auto
from peft_sam._peft.cards import enter_cards
from peft_sam._peft.configs import enter_configs
from peft_sam._peft.embeddings import enter_embeddings
from peft_sam._peft.files import enter_files
from peft_sam._peft.kind import SAM_SPARSE
from peft_sam._peft.mixed import enter_mixed
from peft_sam._peft.names import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)


def register(
    config_cls: type,
    model_cls: Any,
    layer_cls: type,
    complete_card: Callable[[Any, str, Path], None],
    other_base: type[Warning],
) -> None:
    """Enter the method in PEFT's tables: config, tuner, prefix, mixed model, heads, the text of the card, and files.

    Called again it replaces what it entered before, so that a reloaded module works.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[SAM_SPARSE] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[SAM_SPARSE] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[SAM_SPARSE] = model_cls.prefix
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[SAM_SPARSE] = model_cls
    enter_mixed(config_cls, layer_cls)
    enter_configs()
    enter_cards(complete_card)
    enter_files(other_base)
    enter_embeddings()
    enter_auto()
