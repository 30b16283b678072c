"""Laws of a language model that is loaded in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_sam import SamConfig, select_parameters


@pytest.mark.parametrize("train_mode", [False, True])
def test_gradients_come_through_all_layers_in_the_pass_and_after_it(train_mode: bool, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **shape)).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits)
    model: Any = get_peft_model(base, SamConfig(task_type="CAUSAL_LM", density=0.02, budget="tensor"))
    ids = torch.randint(1, 60, (2, 8))
    select_parameters(model, [{"input_ids": ids, "labels": ids}], train_mode=train_mode, progress=False)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    deltas = model.base_model.sparse_deltas()
    assert len(deltas) == 14
    assert all(bool(delta.values.grad.any()) for delta in deltas.values())
