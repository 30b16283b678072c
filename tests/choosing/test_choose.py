"""Laws of scores and selections."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_sam import Selection, choose
from peft_sam.scores import SCORES
from peft_sam.selection import METADATA_KEY, read_metadata
from tests.shared import reference


def parameters() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(4, 5), "a.bias": torch.randn(4), "b.weight": torch.randn(3, 4, 2)}


def statistics(of: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    gradient = {name: torch.randn_like(p) for name, p in of.items()}
    return {
        "gradient": gradient,
        "squared_gradient": {name: g**2 for name, g in gradient.items()},
        "movement": {name: torch.randn_like(g) for name, g in gradient.items()},
        "curvature": {name: torch.rand_like(g) + 0.1 for name, g in gradient.items()},
    }


def needed(score: str, every: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {kind: every[kind] for kind in SCORES[score].statistics}


@pytest.mark.parametrize("score", ["sam", "fisher", "magnitude"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.5, 1.0])
def test_a_global_budget_takes_the_k_largest_scores_of_all_tensors(score: str, density: float) -> None:
    of = parameters()
    every = statistics(of)
    found = choose(of, score=score, density=density, statistics=needed(score, every))
    squares = {"sam": every["gradient"], "fisher": every["gradient"], "magnitude": of}[score]
    k = reference.budget(density, 48)
    expected = reference.largest({name: tensor.double() ** 2 for name, tensor in squares.items()}, k)
    assert {name: i.tolist() for name, i in found.indices.items()} == expected
    assert found.k == k
    assert found.m == 48


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_a_tensor_budget_takes_the_share_of_each_tensor(density: float) -> None:
    of = parameters()
    every = statistics(of)
    found = choose(of, score="sam", density=density, budget="tensor", statistics=needed("sam", every))
    for name, tensor in every["gradient"].items():
        expected = reference.largest({name: tensor.abs()}, reference.budget(density, tensor.numel()))
        assert found.indices[name].tolist() == expected[name]


@given(st.floats(0.1, 1.0), st.integers(0, 5))
def test_a_random_selection_repeats_for_a_seed_and_has_k_entries(density: float, seed: int) -> None:
    of = parameters()
    one, other = (choose(of, score="random", density=density, seed=seed) for _ in range(2))
    assert one.k == reference.budget(density, 48)
    assert all(torch.equal(one.indices[name], other.indices[name]) for name in of)
    third = choose(of, score="random", density=0.5, seed=seed + 1)
    assert {n: i.tolist() for n, i in third.indices.items()} != {
        n: i.tolist() for n, i in choose(of, score="random", density=0.5, seed=seed).indices.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_random_selection_is_the_same_whatever_dtype_torch_makes_by_default(
    dtype: torch.dtype,
) -> None:
    of = {"a": torch.zeros(500, 20), "b": torch.zeros(500, 20)}
    expected = choose(of, score="random", density=0.01, seed=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = choose(of, score="random", density=0.01, seed=1)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found.indices[name], expected.indices[name]) for name in of)


def test_a_random_selection_is_uniform_over_positions() -> None:
    of = {"w": torch.zeros(50)}
    hits = torch.zeros(50)
    for seed in range(400):
        hits[choose(of, score="random", density=0.2, seed=seed).indices["w"]] += 1
    # 400 draws of probability 0.2: mean 80, standard deviation 8
    assert float(hits.min()) > 40
    assert float(hits.max()) < 120


def test_the_score_of_biases_takes_them_first_and_then_what_a_random_mask_takes() -> None:
    of = {"a.weight": torch.randn(4, 5), "a.bias": torch.randn(4), "a.in_proj_bias": torch.randn(6)}
    few, exact, more = (choose(of, score="bias", density=k / 30) for k in (5.5, 10.5, 15.5))
    assert few.k == 5
    assert not len(few.indices["a.weight"])
    assert exact.counts == {"a.bias": 4, "a.in_proj_bias": 6}
    assert more.counts == {"a.weight": 5, "a.bias": 4, "a.in_proj_bias": 6}
    rest = choose({"a.weight": of["a.weight"]}, score="random", density=0.25)
    assert torch.equal(more.indices["a.weight"], rest.indices["a.weight"])


def test_a_matrix_is_no_bias_whatever_its_name() -> None:
    of = {"table.bias": torch.randn(4, 5), "b.bias": torch.randn(4)}
    assert choose(of, score="bias", density=4.5 / 24).counts == {"b.bias": 4}


@pytest.mark.parametrize("score", sorted(SCORES))
def test_computing_scores_in_pieces_changes_nothing(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = parameters()
    every = needed(score, statistics(of))
    whole = choose(of, score=score, density=0.3, statistics=every)
    if "noise" in SCORES[score].inputs:  # the size of the pieces is part of how noise is drawn
        return
    monkeypatch.setattr("peft_sam.choosing.choose.CHUNK", 7)
    pieces = choose(of, score=score, density=0.3, statistics=every)
    assert all(torch.equal(whole.indices[name], pieces.indices[name]) for name in of)


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12])
def test_scaling_the_loss_does_not_change_the_selection(factor: float) -> None:
    of = parameters()
    gradient = statistics(of)["gradient"]
    one = choose(of, density=0.3, statistics={"gradient": gradient})
    other = choose(of, density=0.3, statistics={"gradient": {n: g * factor for n, g in gradient.items()}})
    assert all(torch.equal(one.indices[name], other.indices[name]) for name in of)


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("score", ["sam", "fisher", "movement", "sam_curvature"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_what_has_no_gradient_is_never_selected(score: str, budget: str, density: float) -> None:
    of = parameters()
    every, reached = statistics(of), {name: torch.rand_like(p) < 0.3 for name, p in of.items()}
    for kind in ("gradient", "squared_gradient", "movement"):
        every[kind] = {name: tensor * reached[name] for name, tensor in every[kind].items()}
    found = choose(of, score=score, density=density, budget=budget, statistics=needed(score, every))
    assert all(bool(reached[name].flatten()[i].all()) for name, i in found.indices.items())
    rows = [reached] if budget == "global" else [{name: r} for name, r in reached.items()]
    asked = [reference.budget(density, sum(r.numel() for r in row.values())) for row in rows]
    there = [sum(int(r.sum()) for r in row.values()) for row in rows]
    assert found.k == sum(map(min, asked, there))


@pytest.mark.parametrize("score", ["sam", "fisher", "movement", "sam_curvature", "magnitude"])
def test_nan_is_never_selected(score: str) -> None:
    of = parameters()
    every = needed(score, statistics(of))
    for tensors in every.values() if every else [of]:
        tensors["a.weight"][1, 2] = float("nan")
    found = choose(of, score=score, density=1.0, statistics=every)
    assert found.k == 47
    assert 7 not in found.indices["a.weight"]


def test_an_entry_without_a_gradient_is_another_than_one_whose_score_is_small() -> None:
    gradient = {"w": torch.tensor([0.0, 1e-45, 0.0, 1e-60], dtype=torch.float64)}
    found = choose({"w": torch.zeros(4)}, density=1.0, statistics={"gradient": gradient})
    assert found.indices["w"].tolist() == [1, 3]


def test_weights_of_zero_can_be_selected_by_scores_that_need_no_data() -> None:
    assert choose({"w": torch.zeros(6)}, score="magnitude", density=0.5).k == 3


def test_ties_go_to_the_earlier_parameter_and_position() -> None:
    of = {"a": torch.ones(3), "b": torch.ones(3)}
    found = choose(of, score="magnitude", density=0.7)
    assert {n: i.tolist() for n, i in found.indices.items()} == {"a": [0, 1, 2], "b": [0]}


def test_every_score_documents_its_formula_and_is_elementwise() -> None:
    for name, row in SCORES.items():
        assert inspect.getdoc(row.function), name
        inputs = [torch.rand(3, 4) - (0.5 if kind in ("weight", "gradient", "movement") else 0) for kind in row.inputs]
        whole = row.function(*inputs)
        assert whole.shape == (3, 4)
        assert bool((whole >= 0).all())
        parts = row.function(*(tensor[1] for tensor in inputs))
        assert torch.equal(parts, whole[1])


def test_a_density_below_one_entry_is_refused() -> None:
    of = {"w": torch.ones(10)}
    with pytest.raises(ValueError, match=r"less than one entry.*at least 0\.1"):
        choose(of, score="magnitude", density=0.01)
    with pytest.raises(ValueError, match="less than one entry"):
        choose(of, score="magnitude", density=0.01, budget="tensor")


def test_a_parameter_without_storage_is_refused_where_its_value_counts() -> None:
    of = {"w": torch.ones(10, device="meta")}
    with pytest.raises(ValueError, match="meta device"):
        choose(of, score="magnitude", density=0.5)
    assert choose(of, score="random", density=0.5).k == 5


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("score", [name for name, row in SCORES.items() if row.statistics])
def test_the_share_is_what_the_selected_entries_have_of_the_absolute_gradient(score: str, budget: str) -> None:
    of = parameters()
    inputs = {kind: statistics(of)[kind] for kind in SCORES[score].statistics}
    selection = choose(of, score=score, density=0.2, budget=budget, statistics=inputs)
    kind = next(kind for kind in ("gradient", "squared_gradient", "movement") if kind in inputs)
    reach = {n: t.abs().sqrt() if kind == "squared_gradient" else t.abs() for n, t in inputs[kind].items()}
    selected = sum(float(reach[n].flatten()[selection.indices[n]].sum()) for n in of)
    assert selection.share == pytest.approx(selected / sum(float(t.sum()) for t in reach.values()), rel=1e-3)


@pytest.mark.parametrize(("scale", "dtype"), [(3e37, torch.float32), (1.0, torch.float16), (1e-30, torch.float32)])
def test_a_share_is_a_number_for_gradients_of_any_size_and_leaves_out_nan(scale: float, dtype: torch.dtype) -> None:
    gradient = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    expected = gradient.topk(10_000).values.sum() / gradient.sum()
    told = torch.cat([gradient * scale, torch.tensor([float("nan")])]).to(dtype)
    found = choose({"w": torch.zeros(len(told))}, density=0.1, statistics={"gradient": {"w": told}})
    assert found.share == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("score", [name for name, row in SCORES.items() if not row.statistics])
def test_without_data_the_share_is_that_of_the_entries(score: str) -> None:
    selection = choose(parameters(), score=score, density=0.25)
    assert selection.share == pytest.approx(selection.k / selection.m, rel=1e-3)


# Selections on disk and on screen


def some_selection() -> Selection:
    of = parameters()
    found = choose(of, density=0.1, statistics={"gradient": statistics(of)["gradient"]})
    found.samples, found.batches, found.seconds = 11, 3, 0.25
    return found


def test_a_saved_selection_loads_unchanged(tmp_path: Path) -> None:
    one = some_selection()
    one.save(tmp_path / "selection.safetensors")
    other = Selection.load(tmp_path / "selection.safetensors")
    assert other.summary() == one.summary()
    assert list(other.indices) == list(one.indices)
    assert all(torch.equal(other.indices[n], one.indices[n]) for n in one.indices)
    assert other.shapes == one.shapes


def test_a_selection_prints_as_a_short_table() -> None:
    text = str(some_selection())
    assert "4 of 48 entries" in text
    assert "11 samples in 3 batches" in text
    assert "of the gradient" in text
    assert len(text.splitlines()) < 16


def test_a_selection_of_an_earlier_version_says_nothing_of_a_share() -> None:
    selection = some_selection()
    selection.share = 0.0
    assert "gradient" not in str(selection)


def damage(tensors: dict[str, Tensor], about: dict[str, Any], how: str) -> None:
    name = max(tensors, key=lambda n: len(tensors[n]))
    support = tensors[name]
    match how:
        case "out of range":
            support[-1] = 10**6
        case "negative":
            support[0] = -3
        case "unsorted":
            tensors[name] = support.flip(0).contiguous()
        case "repeated":
            support[1:] = support[0]
        case "floating point":
            tensors[name] = support.float()
        case "missing parameter":
            del tensors[name]
        case "no shapes":
            del about["shapes"]
        case "unknown field":
            about["surprise"] = 1
        case "bad threshold":
            about["threshold"] = "high"
        case "a share of more than all":
            about["share"] = 5
        case "a name that terminals obey":
            about["unit"] = "\x1b[2J"
        case "a shape beyond memory":
            about["shapes"][name] = [2**70]


@pytest.mark.parametrize(
    "how",
    [
        "out of range",
        "negative",
        "unsorted",
        "repeated",
        "floating point",
        "missing parameter",
        "no shapes",
        "unknown field",
        "bad threshold",
        "a share of more than all",
        "a name that terminals obey",
        "a shape beyond memory",
    ],
)
def test_a_damaged_selection_file_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "selection.safetensors"
    some_selection().save(path)
    tensors = load_file(path)
    about = json.loads(read_metadata(path))
    damage(tensors, about, how)
    save_file(tensors, path, {METADATA_KEY: json.dumps(about)})
    with pytest.raises(ValueError, match=r"selection file|support"):
        Selection.load(path)


def test_a_truncated_foreign_or_missing_selection_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "selection.safetensors"
    some_selection().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        Selection.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a selection file"):
        Selection.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Selection.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": "sum"}, "score must be one of"),
        ({"budget": "layer"}, r"budget must be one of \['global', 'tensor'\]; got 'layer'"),
        ({"density": 2}, "0 < density <= 1; got 2"),
        ({"density": float("nan")}, "0 < density <= 1; got nan"),
        ({"score": "sam"}, "score 'sam' needs the statistic 'gradient' of 'a.weight'"),
        ({"score": "sam", "statistics": {"gradient": {"a.weight": torch.ones(4, 5)}}}, "of 'a.bias'"),
        ({"score": "sam", "statistics": {"gradient": {"a.weight": torch.ones(9, 5)}}}, r"has shape \(9, 5\), and the"),
        ({"score": "sam", "statistics": [1]}, "statistics must be a map with the names of parameters; got list"),
        ({"exclude": "a.weight"}, "exclude must be a map with the names of parameters; got str"),
    ],
)
def test_what_cannot_be_chosen_by_is_an_error_that_says_what_was_expected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(parameters(), **{"score": "random", **wrong})
