"""What the installed versions of other libraries can do; the tests run with the oldest and the newest of them."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

import pytest
import transformers.utils.hub
from packaging.version import Version
from transformers import TrainingArguments
from transformers.integrations import peft as adapters_of_transformers

compiles = pytest.mark.skipif(
    Version(version("torch")) < Version("2.7"),
    reason="torch 2.6 does not compile the context managers of PEFT's forward",
)

# transformers 5.24 asks for PEFT 0.22 before there is one
takes_adapters = pytest.mark.skipif(
    Version(adapters_of_transformers.MIN_PEFT_VERSION) > Version(version("peft")),
    reason="transformers' own adapter methods refuse the installed PEFT",
)


def checkpoint_activations(model: Any, reentrant: bool) -> None:
    """Gradient checkpointing under whichever of its names the installed transformers knows."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def activation_checkpointing(reentrant: bool) -> dict[str, Any]:
    """The same as options of TrainingArguments."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


def hub_clients_of_transformers() -> list[Any]:
    """The hub client that transformers keeps; older ones use huggingface_hub's own."""
    kept = getattr(transformers.utils.hub, "hf_api", None)
    return [] if kept is None else [kept()]
