"""Laws of a model that is merged for a while."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_sam
from peft_sam import SamConfig
from tests.layers.test_quantised import quantised
from tests.shared.cases import NETS, NetCase, Sequential, bert, names

RANDOM: dict[str, Any] = {"score": "random", "density": 0.1, "init_weights": False}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", NETS, ids=names)
def test_inside_the_model_is_the_merged_one_and_afterwards_it_has_its_own_bits(
    case: NetCase, dtype: torch.dtype
) -> None:
    model: Any = get_peft_model(case.make().to(dtype), SamConfig(task_type=case.task_type, **RANDOM, **case.options))
    model, before = model.eval(), bits(model)
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.batch(2).items()}
    expected = copy.deepcopy(model).merge_and_unload()(**batch).logits
    for _ in range(2):
        with peft_sam.merged(model) as same:
            assert same is model
            assert torch.equal(model(**batch).logits, expected)
        assert bits(model) == before


def test_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(bert(), SamConfig(**RANDOM))
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), peft_sam.merged(model):
        raise KeyboardInterrupt
    assert bits(model) == before
    with peft_sam.merged(model):
        model.unmerge_adapter()
    assert bits(model) == before


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_gets_its_codes_back() -> None:
    model: Any = get_peft_model(
        quantised("4 bits", Sequential(nn.Linear(64, 64))), SamConfig(target_modules="all", **RANDOM)
    )
    before, x = bits(model), torch.randn(2, 64)
    unmerged = model(x)
    with peft_sam.merged(model):
        assert not torch.equal(model(x), unmerged)
    assert bits(model) == before
    assert torch.equal(model(x), unmerged)


def test_only_the_named_adapters_are_merged() -> None:
    model: Any = get_peft_model(bert(), SamConfig(**RANDOM))
    model.add_adapter("second", SamConfig(**RANDOM | {"seed": 1}))
    with peft_sam.merged(model, ["second"]):
        assert {name for layer in model.modules() for name in getattr(layer, "merged_adapters", ())} == {"second"}


def merged() -> Any:
    model: Any = get_peft_model(bert(), SamConfig(**RANDOM))
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (bert, TypeError, "for a PeftModel with SAM adapters; got a BertFor"),
        (lambda: get_peft_model(bert(), LoraConfig(target_modules=["query"])), TypeError, "with SAM adapters"),
        (merged, ValueError, r"\['default'\] are merged already: call model.unmerge_adapter"),
    ],
)
def test_what_cannot_be_merged_is_an_error(make: Any, error: type[Exception], message: str) -> None:
    model = make()
    before = bits(model)
    with pytest.raises(error, match=message), peft_sam.merged(model):
        pass
    assert bits(model) == before
