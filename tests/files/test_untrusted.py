"""Laws of files from strangers: they load as they should or are refused, and what was there stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_sam.files.checkpoint import read_file
from peft_sam.layers.found import sam_layers
from tests.files.test_checkpoint import FILE, logits, trained

CONFIG = "adapter_config.json"


def as_format_1(folder: Path, model: Any) -> dict[str, Tensor]:
    """Rewrite a saved adapter in the first format; its tensors."""
    deltas, state = model.base_model.sparse_deltas(), {}
    for key, tensor in load_file(folder / FILE).items():
        if key.endswith(".support"):
            module, _, parameter = (
                key.removeprefix("base_model.model.").removesuffix(".support").partition(".sam_sparse_delta.")
            )
            state[key.removesuffix("support") + "indices"] = deltas[f"{module}.{parameter}"].indices.int()
        else:
            state[key] = tensor
    config = json.loads((folder / CONFIG).read_text())
    del config["selection"]["format"]
    (folder / CONFIG).write_text(json.dumps(config))
    return state


def largest_key(state: dict[str, Tensor], part: str) -> str:
    return max((k for k in state if k.endswith(part)), key=lambda k: len(state[k]))


def damage(state: dict[str, Tensor], how: str) -> None:
    """Damage the tensors of a file of format 1."""
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


def damage_coded(state: dict[str, Tensor], how: str) -> None:
    """Damage the tensors of a file of format 2."""
    support, values = largest_key(state, "support"), largest_key(state, "values")
    match how:
        case "a code too short":
            state[support] = state[support][:-1].clone()
        case "a code too long":
            state[support] = torch.cat([state[support], torch.zeros(1, dtype=torch.uint8)])
        case "an empty code":
            state[support] = state[support][:0].clone()
        case "a code with a position more":
            state[support][-1] |= 0x80
        case "a code without positions":
            state[support].zero_()
        case "a code all ones":
            state[support].fill_(255)
        case "a code as integers":
            state[support] = state[support].int()
        case "a code as a matrix":
            state[support] = state[support].unsqueeze(0)
        case "values of eight bits":
            state[values] = state[values].to(torch.float8_e4m3fn)
        case "a head of integers":
            head = next(key for key in state if "sam_sparse_" not in key)
            state[head] = state[head].long()
        case "values as a number":
            state[values] = state[values][0].clone()
        case "values as a matrix":
            state[values] = state[values].unsqueeze(0)
        case "no code":
            del state[support]
        case "a weight of the base":
            state["base_model.model.bert.encoder.layer.0.output.LayerNorm.weight"] = torch.full((16,), 7.0)
        case "a wrapped weight of the base":
            state["base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight"] = torch.full((16, 32), 7.0)
        case "no head":
            del state["base_model.model.classifier.weight"]


CODED_DAMAGES = [
    "a code too short",
    "a code too long",
    "an empty code",
    "a code with a position more",
    "a code without positions",
    "a code all ones",
    "a code as integers",
    "a code as a matrix",
    "values of eight bits",
    "a head of integers",
    "values as a number",
    "values as a matrix",
    "no code",
    "a weight of the base",
    "a wrapped weight of the base",
    "no head",
]


def save_damaged(model: Any, folder: Path, how: str) -> None:
    model.save_pretrained(folder)
    if how in DAMAGES:
        damage(state := as_format_1(folder, model), how)
    else:
        damage_coded(state := load_file(folder / FILE), how)
    save_file(state, folder / FILE)


def bits(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_untouched(before: dict[str, tuple[Tensor, bool]], kinds: list[type], model: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == kinds
    after = bits(model)
    assert before.keys() == after.keys()
    for name, (tensor, flag) in before.items():
        assert torch.equal(tensor, after[name][0]), name
        assert flag == after[name][1], name


@pytest.mark.parametrize("how", DAMAGES + CODED_DAMAGES)
def test_a_damaged_file_is_refused_and_the_base_model_is_as_before(tmp_path: Path, how: str) -> None:
    model, base = trained()
    save_damaged(model, tmp_path, how)
    before, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"support|adapter file"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_untouched(before, kinds, base)


@pytest.mark.parametrize("how", [*DAMAGES[:3], *CODED_DAMAGES])
def test_a_damaged_second_adapter_leaves_the_first_as_before(tmp_path: Path, how: str) -> None:
    model, _ = trained()
    save_damaged(model, tmp_path, how)
    before, kinds, out = bits(model), [type(m) for m in model.modules()], logits(model)
    with pytest.raises(ValueError, match=r"support|adapter file"):
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
