"""Laws of `target_parameters`: what is named is a candidate, and no more of its module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_sam import SamConfig, select_parameters
from peft_sam._peft import NoMatchingPeftModuleError
from peft_sam.tuner.candidates import candidates_of
from tests.shared.cases import MODULES, NETS, ModuleCase, mixtral, names

EXPERTS = "model.layers.0.mlp.experts"


def candidates(model: nn.Module, **options: Any) -> set[str]:
    return set(candidates_of(get_peft_model(model, SamConfig(**options)), "default"))


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_each_parameter_alone_is_the_only_candidate_trains_and_merges(case: ModuleCase, tmp_path: Path) -> None:
    base = case.make()
    for name in sorted(candidates(copy.deepcopy(base), target_modules="all")):
        torch.manual_seed(0)
        density = max(0.2, min(1.0, 1.5 / base.get_parameter(name).numel()))
        config = SamConfig(target_modules=[], target_parameters=[name], density=density)
        model: Any = get_peft_model(copy.deepcopy(base), config)
        assert set(candidates_of(model, "default")) == {name}
        x = case.input()
        select_parameters(model, [x], loss_fn=lambda model, x: (model(x).double() ** 2).sum(), progress=False)
        assert set(model.base_model.sparse_deltas()) == {name}
        delta = model.base_model.sparse_deltas()[name]
        model(x).double().sin().sum().backward()
        assert delta.values.grad is not None
        with torch.no_grad():
            delta.values.add_(torch.randn_like(delta.values) * 0.1)
            expected = model(x)
            model.save_pretrained(tmp_path / name, save_embedding_layers=False)
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
            torch.testing.assert_close(loaded(x), expected)
            torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_fused_experts_are_targeted_by_name_as_in_lora_beside_the_modules() -> None:
    wanted = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    found = candidates(mixtral(), **wanted)
    assert found == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj.weight", "mlp.experts.down_proj")
    }
    theirs = get_peft_model(mixtral(), LoraConfig(**wanted))
    assert len(theirs.base_model.targeted_parameter_names) == 2
    ours = get_peft_model(mixtral(), SamConfig(**wanted))
    assert set(ours.base_model.targeted_parameter_names) == set(theirs.base_model.targeted_parameter_names)


def test_a_second_adapter_takes_another_parameter_of_the_same_module() -> None:
    base = mixtral()
    options: dict[str, Any] = {"target_modules": [], "score": "random", "density": 0.2, "init_weights": False}
    model: Any = get_peft_model(copy.deepcopy(base), SamConfig(target_parameters=[f"{EXPERTS}.down_proj"], **options))
    model.add_adapter("second", SamConfig(target_parameters=[f"{EXPERTS}.gate_up_proj"], **options))
    assert set(model.base_model.sparse_deltas()) == {f"{EXPERTS}.down_proj"}
    assert set(model.base_model.sparse_deltas("second")) == {f"{EXPERTS}.gate_up_proj"}
    batch = NETS[5].batch(2)
    model.eval()
    model.set_adapter("second")
    assert not torch.equal(model(**batch).logits, base.eval()(**batch).logits)
    model.set_adapter("default")
    model.delete_adapter("second")
    unloaded = model.unload()
    assert torch.equal(unloaded(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("options", [{}, {"target_parameters": ["nothing"]}])
def test_nothing_to_target_is_an_error_in_peft_s_words(options: Any) -> None:
    with pytest.raises(
        NoMatchingPeftModuleError, match="No `target_modules` passed but also no `target_parameters` found"
    ):
        candidates(mixtral(), target_modules=[], **options)
