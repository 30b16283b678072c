"""Laws of batches in which each sample has an adapter of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_sam import SamConfig
from tests.shared.cases import VOCABULARY, bert, gpt2

NAMES = ["first", "__base__", "second", "first", "second"]


def adapted(base: Any, **options: Any) -> Any:
    options = {"score": "random", "init_weights": False, "density": 0.1, **options}
    model = get_peft_model(base, SamConfig(**options), adapter_name="first")
    model.add_adapter("second", SamConfig(**{**options, "seed": 1}))
    return model.eval()


def sample_by_sample(model: Any, ids: Tensor, names: list[str]) -> Tensor:
    found = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                found.append(model(input_ids=row[None]).logits)
        else:
            model.set_adapter(name)
            found.append(model(input_ids=row[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("options", [{}, {"task_type": "SEQ_CLS"}, {"target_modules": ["query", "LayerNorm"]}])
@torch.no_grad()
def test_each_sample_gets_what_its_adapter_gives_it_alone(options: dict[str, Any]) -> None:
    model = adapted(bert(), **options)
    for head in getattr(model.get_base_model().classifier, "modules_to_save", {}).values():
        nn.init.normal_(head.weight)
    ids = torch.randint(1, VOCABULARY, (5, 7))
    expected = sample_by_sample(model, ids, NAMES)
    model.set_adapter("first")
    torch.testing.assert_close(model(input_ids=ids, adapter_names=NAMES).logits, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, sample_by_sample(model, ids, ["first"] * 5))
    assert len({tuple(row.tolist()) for row in expected}) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_sample_alone(beams: int) -> None:
    model = adapted(gpt2(), task_type="CAUSAL_LM", target_modules="all-linear")
    ids = torch.randint(1, VOCABULARY, (3, 4))
    names = ["second", "first", "second"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = []
    for row, name in zip(ids, names, strict=True):
        model.set_adapter(name)
        expected.append(model.generate(input_ids=row[None], **options)[0])
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("names", "before", "message"),
    [
        (["first", "other"], lambda m: None, r"adapter_names has \['other'\]; the adapters are \['first', 'second'\]"),
        (["first", "first"], lambda m: m.train(), "call model.eval"),
        (["first", "first"], lambda m: m.merge_adapter(["second"]), "needs unmerged adapters"),
        (["first"] * 3, lambda m: None, "3 names for a module's batch of 2 samples"),
    ],
)
def test_names_that_do_not_fit_are_refused_and_leave_nothing_behind(names: Any, before: Any, message: str) -> None:
    model = adapted(bert())
    ids = torch.randint(1, VOCABULARY, (2, 7))
    alone = copy.deepcopy(model)
    before(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, adapter_names=names)
    model.eval()
    if model.base_model.model.bert.encoder.layer[0].attention.self.query.merged:
        model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_a_module_that_is_called_with_more_than_one_tensor_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bilinear(x, x)

    model = adapted(Two(), target_modules=["bilinear"], density=0.5)
    with pytest.raises(ValueError, match=r"for modules of one tensor, which .*Bilinear"):
        model(x=torch.randn(2, 3), adapter_names=["first", "second"])
