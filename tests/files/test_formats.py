"""Laws of file formats: every format that was ever written keeps loading, through every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from peft_sam.layers.found import deltas_of
from peft_sam.recorded import FORMAT
from tests.shared.versions import takes_adapters

FILES = Path(__file__).parent / "saved"
FORMATS = [f"format-{number}" for number in range(1, FORMAT + 1)]
BATCH = {"input_ids": torch.arange(24).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}


def base() -> BertForSequenceClassification:
    """A base model that is the same with every version of torch and transformers."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) / (number + 1))
    return model.eval()


def expected() -> dict[str, tuple[Tensor, Tensor]]:
    """What the file of format 1, which is read here by hand, holds."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(FILES / "format-1" / "adapter_model.safetensors").items():
        if "sam_sparse_delta" in key:
            module, _, rest = key.removeprefix("base_model.model.").partition(".sam_sparse_delta.")
            parameter, part = rest.split(".")
            found.setdefault(f"{module}.{parameter}", {})[part] = tensor
    return {name: (parts["indices"].long(), parts["values"]) for name, parts in found.items()}


@pytest.mark.parametrize("door", ["PeftModel", "PeftModel, low memory", "transformers", "transformers, low memory"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_of_each_format_loads_through_each_door(form: str, door: str) -> None:
    model = base()
    low = door.endswith("memory")
    if door.startswith("PeftModel"):
        loaded: torch.nn.Module = PeftModel.from_pretrained(model, FILES / form, low_cpu_mem_usage=low).base_model.model
    else:
        loaded = model
        model.load_adapter(str(FILES / form), low_cpu_mem_usage=low)
    deltas = deltas_of(loaded, "default")
    assert {name for name, delta in deltas.items() if not delta.pending} == expected().keys()
    for name, (indices, values) in expected().items():
        assert torch.equal(deltas[name].checked_indices(), indices)
        assert torch.equal(deltas[name].values, values)
    dense = base()
    with torch.no_grad():
        for name, (indices, values) in expected().items():
            dense.get_parameter(name).view(-1)[indices] += values
        torch.testing.assert_close(loaded(**BATCH).logits, dense(**BATCH).logits)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("door", ["PeftModel", pytest.param("transformers", marks=takes_adapters)])
def test_a_file_of_each_format_is_saved_in_the_newest(tmp_path: Path, form: str, door: str) -> None:
    model = base()
    if door == "PeftModel":
        PeftModel.from_pretrained(model, FILES / form).save_pretrained(tmp_path, save_embedding_layers=False)
    else:
        model.load_adapter(str(FILES / form))
        model.save_pretrained(tmp_path)
    newest = load_file(FILES / FORMATS[-1] / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == newest.keys()
    assert all(torch.equal(saved[key], newest[key]) for key in newest)
    again = base()
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


def test_a_file_of_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    shutil.copytree(FILES / "format-2", tmp_path / "newer")
    path = tmp_path / "newer" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["selection"]["format"] = FORMAT + 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"format {FORMAT + 1}.*upgrade"):
        PeftConfig.from_pretrained(str(tmp_path / "newer"))
