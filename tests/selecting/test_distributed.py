"""Laws of selecting with several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_sam import Selection
from tests.processes.launch import launch, start
from tests.processes.selecting import SCENARIOS

# numbers of processes; the gate has the fewest and the most of a kind
SOME = [2, pytest.param(3, marks=pytest.mark.extra), 4]
UNEVEN = [pytest.param(2, marks=pytest.mark.extra), 3]
By = Callable[[int], Path]


@pytest.fixture(scope="module")
def selections(tmp_path_factory: pytest.TempPathFactory) -> By:
    """Number of processes → the folder with what each of them selected in each scenario."""
    folder = tmp_path_factory.mktemp("selections")
    return cache(lambda processes: launch("selecting", processes, folder / str(processes)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", SOME)
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_many_processes_select_what_one_selects(selections: By, scenario: str, processes: int) -> None:
    one = Selection.load(selections(1) / f"{scenario}-0.safetensors")
    every = [Selection.load(selections(processes) / f"{scenario}-{r}.safetensors") for r in range(processes)]
    for selection in every:
        assert selection.samples == one.samples
        assert selection.share == pytest.approx(one.share, rel=2e-3)
        assert selection.threshold == pytest.approx(one.threshold, rel=1e-5)
        assert all(torch.equal(selection.indices[name], every[0].indices[name]) for name in one.indices)
    different = sum(len(set(one.indices[name].tolist()) ^ set(every[0].indices[name].tolist())) for name in one.indices)
    # entries whose scores agree with the threshold to rounding may change places
    assert different <= 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", SOME)
def test_the_number_of_collectives_does_not_grow_with_the_batches(selections: By, processes: int) -> None:
    for rank in range(processes):
        few, many = json.loads((selections(processes) / f"collectives-{rank}.json").read_text())
        # one sum per candidate parameter, of the samples, and of the errors
        assert 0 < few == many <= 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What training in one process does, and in two."""
    folder = tmp_path_factory.mktemp("trained")
    return [torch.load(launch("train", n, folder / f"{n}.pt")) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["FSDP2", "DDP", "Trainer"])
def test_two_processes_train_as_one(trained: list[dict[str, dict[str, torch.Tensor]]], how: str) -> None:
    one, two = (of[how] for of in trained)
    assert any(bool(tensor.any()) for tensor in one.values())
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> By:
    """Number of processes → the folder with what was selected, trained and saved on shards; one: on a whole model."""
    folder = tmp_path_factory.mktemp("sharded")
    return cache(lambda processes: launch("shard", processes, folder / str(processes)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", UNEVEN)
@pytest.mark.parametrize("what", ["sam", "fisher", "sam_curvature", "sam apart", "accelerate"])
def test_a_sharded_model_selects_what_a_whole_one_selects(sharded: By, what: str, processes: int) -> None:
    one = Selection.load(sharded(1) / f"{what}-0.safetensors")
    every = [Selection.load(sharded(processes) / f"{what}-{r}.safetensors") for r in range(processes)]
    assert all(selection.samples == one.samples == 23 for selection in every)
    assert all(selection.batches == one.batches or what == "accelerate" for selection in every)
    for selection in every:
        assert selection.share == pytest.approx(one.share, rel=2e-3)
        assert selection.threshold == pytest.approx(one.threshold, rel=1e-5)
        assert all(torch.equal(selection.indices[name], one.indices[name]) for name in one.indices)


@pytest.mark.slow
@pytest.mark.parametrize("processes", UNEVEN)
@pytest.mark.parametrize("what", ["sam", "fisher", "sam_curvature", "magnitude", "random", "accelerate"])
def test_a_sharded_model_trains_saves_and_loads_as_a_whole_one(sharded: By, what: str, processes: int) -> None:
    one, many = (load_file(sharded(n) / what / "adapter_model.safetensors") for n in (1, processes))
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-7)
    assert any(bool(tensor.any()) for key, tensor in one.items() if key.endswith(".values"))
    if what != "accelerate":
        expected = torch.load(sharded(1) / f"{what}-0.logits")
        for rank in range(processes):
            torch.testing.assert_close(torch.load(sharded(processes) / f"{what}-{rank}.logits"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", UNEVEN)
def test_each_process_holds_only_its_shard_of_the_statistics(sharded: By, processes: int) -> None:
    whole = json.loads((sharded(1) / "held-0.json").read_text())
    held = [json.loads((sharded(processes) / f"held-{rank}.json").read_text()) for rank in range(processes)]
    assert sum(held) == whole
    assert max(held) <= whole / processes * 1.1  # rows are not always divisible


@pytest.mark.slow
def test_zero_3_selects_trains_and_saves_what_one_process_does(tmp_path: Path) -> None:
    folders = {n: launch("zero", n, tmp_path / str(n)) for n in (1, 2)}
    one, *many = (Selection.load(folders[n] / f"zero-{r}.safetensors") for n, r in ((1, 0), (2, 0), (2, 1)))
    for selection in many:
        assert selection.samples == one.samples == 23
        assert all(torch.equal(selection.indices[name], one.indices[name]) for name in one.indices)
    whole, taken_apart = (load_file(folders[n] / "zero" / "adapter_model.safetensors") for n in (1, 2))
    torch.testing.assert_close(taken_apart, whole, rtol=1e-4, atol=1e-7)


def fail(failure: str, sharded: str, folder: Path) -> list[str]:
    """What each of two processes printed when the second failed."""
    both = start("fail", failure, sharded, processes=2, folder=folder)
    first = both[0].printed()
    if failure == "hang":
        both[1].process.kill()
    return [first, both[1].printed()]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["sharded", "whole"])
def test_a_nan_on_one_process_ends_all_with_an_error_that_names_process_and_batch(sharded: str, tmp_path: Path) -> None:
    first, second = fail("NaN", sharded, tmp_path)
    assert "FloatingPointError: the loss of batch 2 is nan" in second
    assert "RuntimeError: process 1 failed, and nothing was selected: FloatingPointError: the loss of batch 2" in first
    assert first.count("pending True, training True") == second.count("pending True, training True") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("failure", "sharded"), [("death", "sharded"), ("death", "whole"), ("hang", "whole")])
def test_a_process_that_dies_or_hangs_ends_the_others_within_the_timeout(
    failure: str, sharded: str, tmp_path: Path
) -> None:
    first, _ = fail(failure, sharded, tmp_path)
    assert "LostProcessError: process 0 lost another process" in first
    assert "(process 1, last seen at batch 2)" in first
    assert "pending True, training True" in first
