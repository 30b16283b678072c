"""Laws of adapter files: what is saved comes back, and nothing else gets in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_sam import PendingAdapterError, SamConfig, select_parameters
from peft_sam.checkpoint import read_file, sam_layers
from tests.cases import NETS, NetCase, bert, names

FILE = "adapter_model.safetensors"
BATCH = NETS[0].batch(3)


def trained(case: NetCase = NETS[0], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, nn.Module]:
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


def logits(model: Any, batch: dict[str, Tensor] = BATCH) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


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
    select_parameters(model, [BATCH], progress=False)
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


def test_the_file_holds_eight_bytes_an_entry_and_only_parameters_with_entries(tmp_path: Path) -> None:
    model, _ = trained()
    model.save_pretrained(tmp_path)
    state = {k: t for k, t in load_file(tmp_path / FILE).items() if ".sam_sparse_" in k}
    deltas = model.base_model.sparse_deltas()
    assert len(state) == 2 * len(deltas)
    assert sum(t.nbytes for t in state.values()) == 8 * sum(len(d.values) for d in deltas.values())


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
        select_parameters(fresh, [BATCH], progress=False)


# Files that are not what they should be


def largest_key(state: dict[str, Tensor], part: str) -> str:
    return max((k for k in state if k.endswith(part)), key=lambda k: len(state[k]))


def damage(state: dict[str, Tensor], how: str) -> None:
    indices, values = largest_key(state, "indices"), largest_key(state, "values")
    match how:
        case "an index out of range":
            state[indices][-1] = 10**6
        case "an index below zero":
            state[indices][0] = -1
        case "the largest integer":
            state[indices][-1] = torch.iinfo(torch.int32).max
        case "unsorted indices":
            state[indices] = state[indices].flip(0).contiguous()
        case "repeated indices":
            state[indices][1] = state[indices][0]
        case "indices as floats":
            state[indices] = state[indices].float()
        case "indices as bytes":
            state[indices] = state[indices].to(torch.uint8)
        case "indices as a matrix":
            state[indices] = state[indices].unsqueeze(0)
        case "fewer values than indices":
            state[values] = state[values][:-1].clone()
        case "integer values":
            state[values] = state[values].int()
        case "no values":
            del state[values]
        case "no indices":
            del state[indices]
        case "fewer entries than announced":
            state[values], state[indices] = state[values][:-1].clone(), state[indices][:-1].clone()
        case "a parameter less than announced":
            del state[values], state[indices]
        case "a parameter that does not exist":
            state[values.replace("weight", "wait")] = state.pop(values)
            state[indices.replace("weight", "wait")] = state.pop(indices)
        case "a module that is no target":
            prefix = "base_model.model.bert.embeddings.LayerNorm.sam_sparse_delta.weight."
            state[prefix + "indices"], state[prefix + "values"] = torch.tensor([1]), torch.ones(1)
        case "no deltas at all":
            for key in [k for k in state if "sam_sparse_" in k]:
                del state[key]


def save_damaged(model: Any, folder: Path, how: str) -> None:
    model.save_pretrained(folder)
    state = load_file(folder / FILE)
    damage(state, how)
    save_file(state, folder / FILE)


DAMAGES = [
    "an index out of range",
    "an index below zero",
    "the largest integer",
    "unsorted indices",
    "repeated indices",
    "indices as floats",
    "indices as bytes",
    "indices as a matrix",
    "fewer values than indices",
    "integer values",
    "no values",
    "no indices",
    "fewer entries than announced",
    "a parameter less than announced",
    "a parameter that does not exist",
    "a module that is no target",
    "no deltas at all",
]


def bits(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_untouched(before: dict[str, tuple[Tensor, bool]], kinds: list[type], model: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == kinds
    after = bits(model)
    assert before.keys() == after.keys()
    for name, (tensor, flag) in before.items():
        assert torch.equal(tensor, after[name][0]), name
        assert flag == after[name][1], name


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused_and_the_base_model_is_as_before(tmp_path: Path, how: str) -> None:
    model, base = trained()
    save_damaged(model, tmp_path, how)
    before, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"support|adapter file"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_untouched(before, kinds, base)


@pytest.mark.parametrize("how", DAMAGES[:3])
def test_a_damaged_second_adapter_leaves_the_first_as_before(tmp_path: Path, how: str) -> None:
    model, _ = trained()
    save_damaged(model, tmp_path, how)
    before, kinds, out = bits(model), [type(m) for m in model.modules()], logits(model)
    with pytest.raises(ValueError, match="support"):
        model.load_adapter(tmp_path, adapter_name="second")
    assert_untouched(before, kinds, model)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -100, -1])
def test_a_truncated_file_is_refused_and_the_base_model_is_as_before(tmp_path: Path, keep: int) -> None:
    model, base = trained()
    model.save_pretrained(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:keep])
    before, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match="truncated or damaged"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_untouched(before, kinds, base)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"bert.encoder.layer.0.attention.self.query.weight": 10**15}, "announces 1000000000000000 entries"),
        ({"nowhere.weight": 3}, "where adapter_config.json says"),
        ({}, "must hold 'counts'"),
    ],
)
def test_a_config_that_lies_about_counts_is_refused_before_memory_is_taken(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    model, base = trained()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "selection": {"counts": counts}}))
    before, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert_untouched(before, kinds, base)


def test_an_adapter_for_another_base_shape_is_refused_by_name(tmp_path: Path) -> None:
    model, _ = trained(target_modules=["dense"], density=0.5)
    model.save_pretrained(tmp_path)
    from transformers import BertConfig, BertForSequenceClassification

    small = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match=r"'bert\.encoder\..*dense\.weight'.* another base model"):
        PeftModel.from_pretrained(small, tmp_path)


def test_a_state_dict_replaces_the_support_of_a_selected_adapter() -> None:
    one, base = trained()
    two = get_peft_model(copy.deepcopy(base), SamConfig(task_type="SEQ_CLS", score="random", density=0.2))
    from peft import get_peft_model_state_dict

    set_peft_model_state_dict(two, get_peft_model_state_dict(one))
    assert torch.equal(logits(two.eval()), logits(one))
    assert two.peft_config["default"].counts == one.peft_config["default"].counts


@settings(max_examples=60)
@given(st.data())
def test_no_tensors_whatever_get_past_the_check_unless_they_are_supports(data: st.DataObject) -> None:
    model, _ = SHARED
    layers = sam_layers(model)
    module = data.draw(st.sampled_from([*layers, "bert", "nowhere"]))
    parameter = data.draw(st.sampled_from(["weight", "bias", "scale"]))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.int16, torch.float32]))
    positions = data.draw(st.lists(st.integers(-2, 600), max_size=6))
    length = data.draw(st.integers(0, 6))
    indices, values = torch.tensor(positions).to(dtype), torch.ones(length)
    prefix = f"base_model.model.{module}.sam_sparse_delta.{parameter}."
    state = {prefix + "indices": indices, prefix + "values": values}
    own = layers[module].parameters_below() if module in layers else {}
    right = (
        parameter in own
        and dtype in (torch.int32, torch.int64)
        and len(positions) == length > 0
        and positions == sorted(set(positions))
        and positions[0] >= 0
        and positions[-1] < own[parameter].numel()
    )
    if right:
        assert read_file(state, layers, "default", None)[module][parameter][0] is indices
    else:
        with pytest.raises(ValueError, match=r"support|adapter file"):
            read_file(state, layers, "default", None)


SHARED = trained(target_modules="all")
