"""Laws of the benchmark of weights that travel."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

FOLDER = Path(__file__).parents[2] / "benchmarks"


def llama() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )


def test_a_patch_takes_two_bytes_an_entry_six_with_its_index_and_a_full_push_two_for_every_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common, weights = importlib.import_module("common"), importlib.import_module("weights")
    monkeypatch.setitem(common.MODELS, "tiny", llama)
    monkeypatch.setattr(common, "DENSITY", 0.1)
    row = weights.measure("tiny", 1, torch.float32, "cpu")
    entries, sizes = row["entries"], row["bytes"]
    assert entries["SAM"] > 1000
    assert 0 < sizes["patch"] - 2 * entries["SAM"] < 10_000
    assert 0 < sizes["first patch"] - sizes["patch"] - 4 * entries["SAM"] < 5_000
    assert 2 * entries["full"] < sizes["full"] < 2 * entries["full"] + 10_000
    assert sizes["LoRA"] > 2 * entries["LoRA"]
    assert all(seconds > 0 for part in ("write_seconds", "apply_seconds") for seconds in row[part].values())
