"""Laws of merging that concern time: what happens to a merged model before it is unmerged, or while it is checked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sam import SamConfig
from peft_sam.layers.found import sam_layers
from tests.shared.cases import Sequential, llama

SCALES = [1.0, 0.5]
RANKS = [None, 3]


def adapted(base: nn.Module, r: int | None, scale: float = 1.0, **options: Any) -> Any:
    told = {"density": 0.1, "score": "random", "r": r, "init_weights": False, **options}
    model = get_peft_model(copy.deepcopy(base), SamConfig(**told)).eval()
    for layer in sam_layers(model).values():
        layer.set_scale("default", scale)
    return model


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stepped(model: Any) -> None:
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(3)


def stepped_past_autograd(model: Any) -> None:
    for parameter in trained(model):
        parameter.data.mul_(3)


def replaced(model: Any) -> None:
    for parameter in trained(model):
        parameter.data = parameter.data * 3


def loaded(model: Any) -> None:
    model.load_state_dict({name: tensor * 3 for name, tensor in model.state_dict().items() if "values" in name}, False)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("write", [stepped, stepped_past_autograd, replaced, loaded])
def test_unmerging_gives_the_bits_back_whatever_was_written_to_the_adapter(
    write: Callable[[Any], None], r: int | None, scale: float
) -> None:
    base = llama().eval()
    model = adapted(base, r, scale)
    model.merge_adapter()
    write(model)
    model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(model.unload().parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", RANKS)
def test_a_model_that_gets_another_dtype_while_merged_gives_the_base_in_it(r: int | None, dtype: torch.dtype) -> None:
    base = llama().eval()
    model = adapted(base, r)
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(model.unload().parameters(), base.to(dtype).parameters(), strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("r", RANKS)
def test_a_copy_of_a_merged_model_unmerges_by_itself(again: Any, r: int | None, scale: float) -> None:
    base = llama().eval()
    model = adapted(base, r, scale)
    model.merge_adapter()
    copied = again(model)
    copied.unmerge_adapter()
    assert not any(layer.merged for layer in sam_layers(copied).values())
    assert all(layer.merged for layer in sam_layers(model).values())
    assert all(torch.equal(p, q) for p, q in zip(copied.unload().parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("r", RANKS)
def test_adapters_that_overflow_only_together_are_merged_into_no_layer(r: int | None, merge: str) -> None:
    base = Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half().requires_grad_(False)
    model = adapted(base, r, density=1.0, target_modules="all-linear")
    model.add_adapter("second", SamConfig(density=1.0, score="random", r=r, init_weights=False))
    for name in ("default", "second"):
        for delta in model.base_model.sparse_deltas(name).values():
            nn.init.constant_(delta.values, 4e4)  # float16 ends at 65,504
    model.base_model.set_adapter(["default", "second"])
    before = copy.deepcopy(model)
    for name in ("default", "second"):
        model.merge_adapter([name], safe_merge=True)
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="The adapter second seems to be broken"):
        getattr(model, merge)(safe_merge=True)
    assert not any(layer.merged for layer in sam_layers(model).values())
    assert [*sam_layers(model)] == [*sam_layers(before)]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())
