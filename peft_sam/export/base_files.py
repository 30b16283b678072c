"""The names of the tensors in the files that a base model was loaded from."""

from __future__ import annotations

import json
import os
from collections.abc import Set
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def names_in_files(base_model: str | None, revision: str | None) -> frozenset[str]:
    """All names, from a folder or from what the hub's cache has; empty if no safetensors file is at hand."""
    if (index := _file(base_model, revision, SAFE_WEIGHTS_INDEX_NAME)) is not None:
        return frozenset(json.loads(index.read_text())["weight_map"])
    if (weights := _file(base_model, revision, SAFE_WEIGHTS_NAME)) is not None:
        with safe_open(weights, framework="pt") as file:
            return frozenset(file.keys())
    return frozenset()


def _file(base_model: str | None, revision: str | None, name: str) -> Path | None:
    if not base_model:
        return None
    if os.path.isdir(base_model):
        path = Path(base_model, name)
        return path if path.is_file() else None
    try:
        found = try_to_load_from_cache(base_model, name, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found) if isinstance(found, str) else None


def name_in_files(name: str, names: Set[str], prefix: str) -> str:
    """The name that a tensor has there: transformers loads a headless model's file into one with a head and back.

    Args:
        name: that the model would save it under.
        prefix: of the headless model in one with a head ("bert"); may be empty.
    """
    for there in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if there in names:
            return there
    return name
