"""Laws of where low-rank pairs are: not at tied weights, in other tuners' layers, in memory that comes later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_sam import SamConfig
from peft_sam.layers.found import base_name, pairs_of, sam_layers
from tests.shared.cases import Sequential, gpt2, llama
from tests.shared.reference import adapted_copy


def config(**options: Any) -> SamConfig:
    told: dict[str, Any] = {"density": 0.1, "score": "random", "r": 3, "init_weights": False, **options}
    return SamConfig(**told)


def ids() -> torch.Tensor:
    return torch.randint(1, 40, (2, 7))


@pytest.mark.parametrize(
    "options", [{"score": "bias", "density": 0.01}, {"score": "magnitude", "density": 0.01}, {"density": 3e-4}]
)
def test_an_adapter_whose_entries_leave_a_tied_weight_alone_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    base = gpt2()
    model: Any = get_peft_model(copy.deepcopy(base), config(target_modules="all", **options)).eval()
    assert "transformer.wte.weight" not in model.base_model.sparse_deltas()
    assert "lm_head" not in pairs_of(model, "default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert pairs_of(again, "default").keys() == pairs_of(model, "default").keys()
    x = ids()
    assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)


class Inside(nn.Module):
    """A model that has got a parent."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize("targets", [r".*(q_proj|down_proj|up_proj)", ["q_proj", "down_proj", "up_proj"]])
def test_an_adapter_follows_renamed_modules_that_have_a_pair_and_no_entries(targets: Any, tmp_path: Path) -> None:
    base = llama()
    model: Any = get_peft_model(copy.deepcopy(base), config(density=1e-3, target_modules=targets)).eval()
    entries = {name.rpartition(".")[0] for name in model.base_model.sparse_deltas()}
    assert entries < pairs_of(model, "default").keys()
    model.save_pretrained(tmp_path)
    renamed = {r"^model\.": "inner.model."}
    again: Any = PeftModel.from_pretrained(Inside(copy.deepcopy(base)), str(tmp_path), key_mapping=renamed).eval()
    x = ids()
    assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)


def test_another_base_is_noticed_by_a_weight_that_only_a_pair_changes(tmp_path: Path) -> None:
    base = Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model: Any = get_peft_model(copy.deepcopy(base), config(density=1e-2, target_modules="all-linear", seed=1))
    (alone,) = pairs_of(model, "default").keys() - {n.rpartition(".")[0] for n in model.base_model.sparse_deltas()}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        base.get_submodule(alone).weight.add_(1)
    with pytest.warns(UserWarning, match=rf"1 of 2 layers have other values at the selected places: '{alone}'"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_in_a_layer_that_lora_has_wrapped_they_are_added_to_what_that_computes() -> None:
    base, x = llama().eval(), ids()
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(copy.deepcopy(base), lora, adapter_name="theirs", mixed=True).eval()
    model.add_adapter("ours", config(target_modules=["q_proj"]))
    model.set_adapter(["theirs", "ours"])
    found = model(input_ids=x).logits
    pairs = pairs_of(model, "ours")
    assert {name.rpartition(".")[2] for name in pairs} == {"q_proj"}
    dense = adapted_copy(base, deltas(model), pairs)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
                weight = dense.get_submodule(base_name(name).removeprefix("base_model.model.")).weight
                weight.add_(module.get_delta_weight("theirs"))
    torch.testing.assert_close(found, dense.eval()(input_ids=x).logits)


def deltas(model: Any) -> dict[str, Any]:
    return {f"{m}.{n}": d for m, layer in sam_layers(model).items() for n, d in layer.deltas("ours").items()}


def test_a_base_without_memory_gets_pairs_that_have_some_as_the_deltas() -> None:
    full = llama()
    with torch.device("meta"):
        base = llama()
    model: Any = get_peft_model(base, config(init_weights=True))
    model.load_state_dict({f"base_model.model.{n}": t for n, t in renamed(model, full).items()}, False, assign=True)
    expected = get_peft_model(full, config(init_weights=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def renamed(model: Any, full: nn.Module) -> dict[str, torch.Tensor]:
    """The base's tensors under the names that they have in `model`."""
    names = {base_name(name): name for name, _ in model.base_model.model.named_parameters() if "sam_sparse" not in name}
    return {names[name]: parameter for name, parameter in full.named_parameters()}


def test_pairs_that_wait_for_a_state_dict_take_it() -> None:
    base, x = llama().eval(), ids()
    model = get_peft_model(copy.deepcopy(base), config()).eval()
    waits = get_peft_model(copy.deepcopy(base), config(seed=7), low_cpu_mem_usage=True).eval()
    assert all(pair.lora_A.is_meta for pair in pairs_of(waits, "default").values())
    waits.load_state_dict(model.state_dict())
    assert torch.equal(waits(input_ids=x).logits, model(input_ids=x).logits)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0)])
def test_a_layer_without_inputs_or_outputs_computes_as_it_did(inputs: int, outputs: int) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        base = Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 2))
    model: Any = get_peft_model(copy.deepcopy(base), config(density=1.0, target_modules=["0", "1"]))
    x = torch.ones(5, inputs)
    torch.testing.assert_close(
        model(x), adapted_copy(base, model.base_model.sparse_deltas(), pairs_of(model, "default"))(x)
    )


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"]])
def test_a_rank_that_no_target_can_have_is_warned_of(targets: list[str]) -> None:
    with pytest.warns(UserWarning, match="r=3 and no low-rank pair: none of its targets is a linear layer"):
        model = get_peft_model(gpt2(), config(target_modules=targets))
    assert not pairs_of(model, "default")
