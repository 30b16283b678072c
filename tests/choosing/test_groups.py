"""Laws of choosing within bounded memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer

from peft_sam import SamConfig, choose, select_parameters
from peft_sam.choosing.groups import Group, choose_by_groups, groups_within
from peft_sam.choosing.threshold import budget_of
from tests.selecting.test_select import arguments, text_data
from tests.shared.cases import bert

BASE = bert()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 30))
def test_groups_cover_every_entry_once_in_order_and_are_never_too_large(sizes: list[int], entries: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    groups = groups_within(named, entries)
    assert all(sum(stop - start for start, stop in group.values()) <= entries for group in groups)
    covered = [(name, i) for group in groups for name, (start, stop) in group.items() for i in range(start, stop)]
    assert covered == [(name, i) for name, size in named.items() for i in range(size)]
    assert len(groups) <= max(1, -(-sum(sizes) // entries))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 20),
    st.sampled_from([0.1, 0.3, 0.7, 1.0]),
    st.sampled_from(["global", "tensor"]),
)
@example([[0, 0], [1]], 1, 0.7, "tensor")  # the only parameter that the loss reaches has no budget
def test_groups_choose_what_one_pass_chooses_ties_included(
    numbers: list[list[int]], entries: int, density: float, budget: str
) -> None:
    gradients = {str(i): torch.tensor(values, dtype=torch.float32) for i, values in enumerate(numbers)}
    parameters = {name: torch.zeros(len(gradient)) for name, gradient in gradients.items()}

    def statistics_of(group: Group) -> dict[str, dict[str, Tensor]]:
        return {"gradient": {name: gradients[name][start:stop] for name, (start, stop) in group.items()}}

    groups = groups_within({name: len(of) for name, of in gradients.items()}, entries)
    options: dict[str, Any] = {"score": "sam", "density": density, "budget": budget}
    total = sum(map(len, numbers)) if budget == "global" else max(map(len, numbers))
    if budget_of(density, total) == 0:
        for choose_it in (
            lambda: choose(parameters, statistics={"gradient": gradients}, **options),
            lambda: choose_by_groups(parameters, groups, statistics_of, **options),
        ):
            with pytest.raises(ValueError, match="less than one entry"):
                choose_it()
        return
    if not any(bool(gradient.any()) for gradient in gradients.values()):
        with pytest.raises(ValueError, match="are zero"):
            choose_by_groups(parameters, groups, statistics_of, **options)
        return
    expected = choose(parameters, statistics={"gradient": gradients}, **options)
    got = choose_by_groups(parameters, groups, statistics_of, **options)
    assert got.threshold == expected.threshold
    assert got.share == pytest.approx(expected.share, rel=1e-3)
    assert list(got.indices) == list(expected.indices)
    assert all(torch.equal(got.indices[name], expected.indices[name]) for name in expected.indices)


def make(**options: Any) -> Any:
    return get_peft_model(copy.deepcopy(BASE), SamConfig(task_type="SEQ_CLS", density=0.05, **options))


def tenth(statistics: int = 1) -> int:
    candidates = sum(p.numel() for n, p in BASE.named_parameters() if "encoder" in n and "LayerNorm" not in n)
    return candidates * 4 * statistics // 10


def shuffled(generator: torch.Generator | None) -> Any:
    data = text_data(24).with_format("torch")
    sampler = RandomSampler(data, generator=generator)  # type: ignore[arg-type]
    return DataLoader(data, batch_size=4, sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("score", ["sam", "fisher"])
def test_a_tenth_of_the_memory_gives_the_same_selection(score: str, budget: str) -> None:
    data = [shuffled(torch.Generator().manual_seed(3)) for _ in range(2)]
    whole = select_parameters(make(score=score, budget=budget), data[0], progress=False)
    parts = select_parameters(make(score=score, budget=budget), data[1], memory_budget=tenth(), progress=False)
    assert parts.samples == whole.samples == 24
    assert parts.threshold == whole.threshold
    assert all(torch.equal(whole.indices[name], parts.indices[name]) for name in whole.indices)


@pytest.mark.parametrize("seeded", [True, False])
def test_every_pass_sees_the_same_batches_in_the_same_order(seeded: bool) -> None:
    found = []
    for memory_budget in (None, tenth()):
        torch.manual_seed(5)
        loader = shuffled(torch.Generator().manual_seed(3) if seeded else None)
        found.append(select_parameters(make(), loader, memory_budget=memory_budget, max_batches=2, progress=False))
    assert found[0].threshold == found[1].threshold
    assert all(torch.equal(found[0].indices[name], found[1].indices[name]) for name in found[0].indices)


def test_a_trainer_s_batches_are_replayed(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for memory_budget in (None, f"{tenth() / 1024}KiB"):
        trainer = Trainer(model=make(), args=arguments(tmp_path), train_dataset=text_data(24))
        found.append(
            select_parameters(trainer, memory_budget=memory_budget, max_batches=2, progress=memory_budget is not None)
        )
    assert "passes over the data" in capsys.readouterr().out
    assert all(torch.equal(found[0].indices[name], found[1].indices[name]) for name in found[0].indices)


def test_batches_that_can_be_read_once_need_one_pass() -> None:
    rows = text_data(8).with_format("torch")
    batch = next(iter(DataLoader(rows, batch_size=8)))  # type: ignore[arg-type]
    select_parameters(make(), iter([batch]), progress=False)
    with pytest.raises(ValueError, match=r"can be read only once \(list_iterator\): pass a DataLoader or a list"):
        select_parameters(make(), iter([batch]), memory_budget=tenth(), progress=False)


def test_a_budget_for_nothing_and_a_share_of_what_is_not_seen_together_are_refused() -> None:
    with pytest.raises(ValueError, match="memory_budget=3 does not hold the statistics of one entry, 4 bytes"):
        select_parameters(make(), [], memory_budget=3)
    with pytest.raises(ValueError, match="set absolute_damping=True"):
        select_parameters(make(score="sam_curvature"), [], memory_budget=tenth())


def test_curvature_with_absolute_damping_is_chosen_in_groups() -> None:
    options = {"score": "sam_curvature", "absolute_damping": True, "damping": 1e-6}
    loader = DataLoader(text_data(24).with_format("torch"), batch_size=4)  # type: ignore[arg-type]
    whole = select_parameters(make(**options), loader, progress=False)
    parts = select_parameters(make(**options), loader, memory_budget=tenth(2), progress=False)
    assert all(torch.equal(whole.indices[name], parts.indices[name]) for name in whole.indices)
