"""Laws of adapter files: what is saved comes back, and nothing else gets in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_sam import PendingAdapterError, SamConfig, select_parameters
from peft_sam.sparse.coding import code_length
from tests.shared.cases import NETS, NetCase, bert, names

pytestmark = pytest.mark.on_device

FILE = "adapter_model.safetensors"


def rows() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return NETS[0].batch(3)


def trained(case: NetCase = NETS[0], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)  # the same base each time
    base = case.make().to(dtype)
    untouched = copy.deepcopy(base)
    config = SamConfig(task_type=case.task_type, **{"density": 0.05, **case.options, **options})
    model = get_peft_model(base, config)
    batch = {k: t.to(dtype) if t.is_floating_point() else t for k, t in case.batch(3).items()}
    select_parameters(model, [batch], progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), untouched


def logits(model: Any, given: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(given or rows())).logits


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", NETS, ids=names)
def test_a_loaded_adapter_computes_the_same_bits(tmp_path: Path, case: NetCase, low_cpu_mem_usage: bool) -> None:
    model, base = trained(case)
    batch = case.batch(2)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    ours, theirs = model.base_model.sparse_deltas(), loaded.base_model.sparse_deltas()
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert torch.equal(delta.indices, theirs[name].indices)
        assert torch.equal(delta.values, theirs[name].values)
    assert loaded.peft_config["default"].selection == model.peft_config["default"].selection


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_float32_values_on_a_bfloat16_base_come_back_unrounded(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model, base = trained(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for name, delta in model.base_model.sparse_deltas().items():
        other = loaded.base_model.sparse_deltas()[name]
        assert delta.values.dtype == other.values.dtype == torch.float32
        assert torch.equal(delta.values, other.values)


def test_an_auto_class_finds_the_base_model_and_the_adapter(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    base = type(bert()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SamConfig(task_type="SEQ_CLS", density=0.05))
    select_parameters(model, [rows()], progress=False)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_a_second_adapter_loads_under_another_name(tmp_path: Path) -> None:
    one, base = trained()
    two, _ = trained(density=0.02, target_modules=["query", "word_embeddings"])
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two", save_embedding_layers=False)
    model = PeftModel.from_pretrained(base, tmp_path / "one")
    first = logits(model)
    model.load_adapter(tmp_path / "two", adapter_name="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    ours, theirs = two.base_model.sparse_deltas(), model.base_model.sparse_deltas("second")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(delta.values, theirs[name].values) for name, delta in ours.items())
    model.save_pretrained(tmp_path / "both", save_embedding_layers=False)
    again = load_file(tmp_path / "both" / "second" / FILE)
    saved = load_file(tmp_path / "two" / FILE)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize(("save_dtype", "bytes_each"), [(None, 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_the_file_holds_values_in_save_dtype_a_code_and_only_parameters_with_entries(
    tmp_path: Path, save_dtype: str | None, bytes_each: int
) -> None:
    model, base = trained(save_dtype=save_dtype)
    model.save_pretrained(tmp_path)
    state = {k: t for k, t in load_file(tmp_path / FILE).items() if ".sam_sparse_" in k}
    deltas = model.base_model.sparse_deltas()
    assert len(state) == 2 * len(deltas)
    k = sum(len(d.values) for d in deltas.values())
    assert sum(t.nbytes for t in state.values()) == bytes_each * k + sum(
        code_length(len(d.values), d.shape.numel()) for d in deltas.values()
    )
    loaded = PeftModel.from_pretrained(base, tmp_path).base_model.sparse_deltas()
    for name, delta in deltas.items():
        assert delta.values.dtype == loaded[name].values.dtype == torch.float32  # what is trained stays as it is
        written = delta.values.to(getattr(torch, save_dtype or "float32"))
        assert torch.equal(written.float(), loaded[name].values)


def test_a_value_too_large_for_save_dtype_is_refused(tmp_path: Path) -> None:
    model, _ = trained(save_dtype="float16")
    name, delta = next(iter(model.base_model.sparse_deltas().items()))
    with torch.no_grad():
        delta.values[0] = 1e5
    with pytest.raises(ValueError, match=rf"{name}.*1e\+05, is too large for save_dtype='float16'"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_resized_embedding_is_saved_beside_its_deltas(tmp_path: Path) -> None:
    model, base = trained(target_modules="all")
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("word_embeddings.base_layer.weight" in key for key in load_file(tmp_path / FILE))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_a_pending_adapter_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(bert(), SamConfig())
    with pytest.raises(PendingAdapterError, match=r"(?s)cannot be saved.*select_parameters"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_config_of_a_saved_adapter_used_for_a_new_one_says_what_to_do(tmp_path: Path) -> None:
    model, base = trained()
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(base, PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"set config\.selection = None"):
        select_parameters(fresh, [rows()], progress=False)


def test_a_state_dict_replaces_the_support_of_a_selected_adapter() -> None:
    one, base = trained()
    two = get_peft_model(copy.deepcopy(base), SamConfig(task_type="SEQ_CLS", score="random", density=0.2))
    from peft import get_peft_model_state_dict

    set_peft_model_state_dict(two, get_peft_model_state_dict(one))
    assert torch.equal(logits(two.eval()), logits(one))
    assert two.peft_config["default"].counts == one.peft_config["default"].counts
