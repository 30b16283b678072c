"""The files that a base model was loaded from: their tensors' names, and its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Set
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

# what tokenizers and processors save
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "normalizer.json"),
)


def names_in_files(base_model: str | None, revision: str | None) -> frozenset[str]:
    """All names, from a folder or from what the hub's cache has; empty if no safetensors file is at hand."""
    if (index := _file(base_model, revision, SAFE_WEIGHTS_INDEX_NAME)) is not None:
        return frozenset(json.loads(index.read_text())["weight_map"])
    if (weights := _file(base_model, revision, SAFE_WEIGHTS_NAME)) is not None:
        with safe_open(weights, framework="pt") as file:
            return frozenset(file.keys())
    return frozenset()


def weight_files(base_model: str | None, revision: str | None) -> list[Path]:
    """The safetensors files, from a folder or from what the hub's cache has; none if one of them is not at hand."""
    if (index := _file(base_model, revision, SAFE_WEIGHTS_INDEX_NAME)) is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    files = [_file(base_model, revision, name) for name in names]
    return [file for file in files if file is not None] if None not in files else []


def copy_tokenizer(base_model: str | None, revision: str | None, folder: Path) -> bool:
    """Copy the base's tokenizer and processor from its folder or the hub; whether there is one.

    What the hub's cache does not have is asked for once, as `from_pretrained` would.
    """
    found = [file for name in TOKENIZER if (file := _file(base_model, revision, name)) is not None]
    for file in found:
        shutil.copy(file, folder / file.name)
    if found or not base_model or os.path.isdir(base_model):
        return bool(found)
    try:
        AutoTokenizer.from_pretrained(base_model, revision=revision).save_pretrained(folder)
    except (OSError, ValueError, HFValidationError):
        return False
    return True


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
