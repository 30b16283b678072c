"""Laws of leaving the entries of other adapters alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_sam import FewerEntriesWarning, SamConfig, Selection, select_parameters
from tests.selecting.test_select import text_data
from tests.shared.cases import bert

BASE = bert()


def config(**options: Any) -> SamConfig:
    return SamConfig(**{"density": 0.1, **options})


def batches() -> list[dict[str, Tensor]]:
    rows = text_data(12).with_format("torch")
    return [rows[at : at + 4] for at in range(0, 12, 4)]


def with_two(**options: Any) -> tuple[Any, Selection]:
    """A model with an adapter that is selected, and a pending one; the first one's selection."""
    model = get_peft_model(copy.deepcopy(BASE), config(**options), "first")
    first = select_parameters(model, batches(), progress=False)
    model.add_adapter("second", config(**options))
    model.set_adapter("second")
    return model, first


def shared(one: Selection, other: Selection) -> int:
    return sum(int(torch.isin(one.indices[n], other.indices[n]).sum()) for n in one.indices)


def select(model: Any, **options: Any) -> Selection:
    return select_parameters(model, batches(), adapter_name="second", progress=False, **options)


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("score", ["sam", "sam_curvature", "fisher", "movement"])
def test_the_second_adapter_takes_the_best_of_what_the_first_leaves(score: str, budget: str) -> None:
    model, first = with_two(score=score, budget=budget)
    second = select(model, exclude="first")
    assert shared(first, second) == 0
    assert second.k == first.k == second.excluded
    assert second.threshold <= first.threshold
    if score != "sam_curvature":  # which does not order entries by what the share sums
        assert second.share < first.share
    assert model.peft_config["second"].selection["excluded"] == first.k
    assert f"without {first.k:,} entries that were excluded" in str(second)


def test_without_a_word_the_same_data_choose_the_same_entries() -> None:
    model, first = with_two()
    assert shared(first, select(model)) == first.k


@pytest.mark.parametrize("memory_budget", [None, 30_000])
def test_an_adapter_its_selection_and_both_exclude_the_same(memory_budget: int | None) -> None:
    found = []
    for how in ("first", "selection", "both"):
        model, first = with_two()
        exclude = {"first": "first", "selection": first, "both": ["first", first]}[how]
        found.append(select(model, exclude=exclude, memory_budget=memory_budget))
    assert found[0].summary().keys() == found[1].summary().keys()
    for one in found[1:]:
        assert all(torch.equal(one.indices[name], found[0].indices[name]) for name in one.indices)
        assert one.excluded == found[0].excluded


def test_a_data_free_score_leaves_them_alone_too() -> None:
    model = get_peft_model(copy.deepcopy(BASE), config(score="random"), "first")
    model.add_adapter("second", config(score="random"), low_cpu_mem_usage=True)  # so that it waits
    second = select_parameters(model, adapter_name="second", exclude="first")
    first = {name: delta.indices for name, delta in model.base_model.sparse_deltas("first").items()}
    assert sum(int(torch.isin(second.indices[name], found).sum()) for name, found in first.items()) == 0
    assert second.k == second.excluded > 0


def test_what_is_left_is_said_where_it_is_less_than_was_asked_for() -> None:
    model, first = with_two(density=0.6)
    with pytest.warns(FewerEntriesWarning, match="have a gradient in the pass and are not excluded"):
        second = select(model, exclude="first")
    assert second.k <= second.m - first.k < first.k


def test_a_saved_selection_and_a_saved_config_keep_it(tmp_path: Path) -> None:
    model, first = with_two()
    select(model, exclude="first").save(tmp_path / "second.safetensors")
    assert Selection.load(tmp_path / "second.safetensors").excluded == first.k
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = SamConfig.from_pretrained(tmp_path / "second")
    assert loaded.selection is not None
    assert loaded.selection["excluded"] == first.k


def other_shapes() -> Selection:
    _, first = with_two()
    return Selection(first.indices, {n: torch.Size((9, *shape)) for n, shape in first.shapes.items()}, "", "", 0.1, 0.0)


def other_names() -> Selection:
    _, first = with_two()
    indices = {f"model.{name}": found for name, found in first.indices.items()}
    return Selection(indices, {f"model.{name}": shape for name, shape in first.shapes.items()}, "", "", 0.1, 0.0)


WRONG: list[tuple[Any, str]] = [
    (lambda: "third", "exclude names 'third', and the model has no SAM adapter 'third'"),
    (lambda: "second", "the model has no SAM adapter 'second' with selected entries"),
    (lambda: [3], "exclude takes names of adapters and Selections; got a int"),
    (lambda: 3, "exclude takes names of adapters and Selections; got a int"),
    (other_names, "the selection in exclude has no parameter in common with the candidates: it has 'model.bert"),
    (other_shapes, r"was made for another base model: .* has shape \(9, "),
]


@pytest.mark.parametrize(("exclude", "says"), WRONG)
def test_what_cannot_be_excluded_is_said_and_nothing_is_selected(exclude: Any, says: str) -> None:
    model, _ = with_two()
    with pytest.raises(ValueError, match=says):
        select(model, exclude=exclude())
    assert model.peft_config["second"].selection is None


def test_a_selection_that_is_given_leaves_nothing_to_exclude() -> None:
    model, first = with_two()
    with pytest.raises(ValueError, match="pass one of them"):
        select(model, selection=first, exclude="first")
