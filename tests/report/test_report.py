"""Laws of the table and the picture of a selection."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_sam import SamConfig, Selection
from peft_sam.report.report import place_of, plot_selection, selection_report
from tests.shared.cases import gpt2

NAMES = ("default", "second")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", ("3", "attention.self.query")),
        ("model.layers.11.mlp.gate_proj.weight", ("11", "mlp.gate_proj")),
        ("model.layers.0.mlp.experts.gate_up_proj", ("0", "mlp.experts")),
        ("bert.encoder.layer.3.attention.output.dense.weight", ("3", "attention.output.dense")),
        ("bert.encoder.layer.3.output.dense.weight", ("3", "output.dense")),
        ("model.layers.2.mlp.experts.5.w1.weight", ("2", "mlp.experts.5.w1")),
        ("bert.pooler.dense.bias", ("-", "pooler.dense")),
        ("0.weight", ("-", "0")),
    ],
)
def test_a_parameter_has_a_layer_and_a_module_type(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place


def some_selection() -> Selection:
    names = [f"layer.{i}.{kind}.{part}" for i in range(3) for kind in ("query", "dense") for part in ("weight", "bias")]
    shapes = {n: torch.Size((4, 5) if n.endswith("weight") else (4,)) for n in names}
    indices = {n: torch.arange(i % 4) for i, n in enumerate(names)}
    return Selection(indices, shapes, "sam", "global", 0.1, 0.5)


def test_the_counts_add_up() -> None:
    selection = some_selection()
    report = selection_report(selection)
    assert report.total.selected == selection.k
    assert report.total.candidates == selection.m
    row = report.places["0", "query"]
    assert (row.selected, row.candidates, row.of_rows, row.of_columns) == (1, 24, 4, 5)


@given(st.sets(st.integers(0, 19), min_size=1), st.sets(st.integers(0, 19), min_size=1))
def test_rows_columns_and_overlap_are_those_of_the_masks(one: set[int], two: set[int]) -> None:
    selections = [
        Selection(
            {"a.0.b.weight": torch.tensor(sorted(of))}, {"a.0.b.weight": torch.Size((4, 5))}, "sam", "global", 1, 0
        )
        for of in (one, two)
    ]
    report = selection_report(selections[0], other=selections[1])
    mask = torch.zeros(4, 5).index_put_((torch.tensor(sorted(one)) // 5, torch.tensor(sorted(one)) % 5), torch.ones(()))
    row = report.places["0", "b"]
    assert (row.rows, row.columns) == (int(mask.any(1).sum()), int(mask.any(0).sum()))
    assert row.shared == len(one & two)
    assert report.overlap == len(one & two) / len(one | two)


def test_a_model_s_adapters_are_reported_and_compared() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model: Any = get_peft_model(base, SamConfig(target_modules=["0", "1"], score="random", density=0.2))
    model.add_adapter("second", SamConfig(target_modules=["0"], score="random", seed=1, density=0.5))
    report = selection_report(model, other="second")
    assert report.total.selected == model.peft_config["default"].selection["k"]
    assert report.total.candidates == sum(p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    both = [{(n, i) for n, d in model.base_model.sparse_deltas(a).items() for i in d.indices.tolist()} for a in NAMES]
    assert report.total.shared == len(both[0] & both[1])
    assert report.overlap == len(both[0] & both[1]) / len(both[0] | both[1])
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "module", "entries", "density", "rows", "columns", "shared"]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[:2] == ["all", f"{report.total.selected}"]
    assert math.isnan(selection_report(model).overlap)
    turned = selection_report(model, "second", other="default")
    assert (turned.total.shared, turned.overlap) == (report.total.shared, report.overlap)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all"},
        {"target_modules": [], "target_parameters": ["c_attn.weight"]},
        {"target_modules": [], "target_parameters": ["lm_head.weight"]},
        {"target_modules": ["c_fc"], "target_parameters": ["c_attn.weight"]},
    ],
)
def test_the_candidates_of_a_report_are_those_that_were_selected_from(options: dict[str, Any]) -> None:
    model: Any = get_peft_model(gpt2(), SamConfig(score="random", density=0.1, **options))
    report = selection_report(model)
    selection = model.peft_config["default"].selection
    assert (report.total.selected, report.total.candidates) == (selection["k"], selection["m"])


def test_an_adapter_in_a_part_of_a_model_is_reported() -> None:
    part: Any = get_peft_model(
        nn.Sequential(nn.Linear(6, 8)), SamConfig(target_modules=["0"], score="random", density=0.2)
    )
    whole = nn.Sequential(part, nn.Linear(8, 2))
    assert str(selection_report(whole)) == str(selection_report(part))


def deep(layers: int) -> Selection:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    kinds = (*kinds, *(f"experts.{i}.w" for i in range(8)))
    names = [f"model.layers.{i}.{kind}.weight" for i in range(layers) for kind in kinds] + ["lm_head.weight"]
    indices = {name: torch.arange(i % 7) for i, name in enumerate(names)}
    return Selection(indices, dict.fromkeys(names, torch.Size((4, 5))), "sam", "global", 0.1, 0.5)


@pytest.mark.parametrize("layers", [6, 30, 126])
def test_a_deep_model_s_report_prints_a_few_lines_that_add_up(layers: int) -> None:
    report = selection_report(deep(layers))
    lines = [line.split() for line in str(report).splitlines()]
    assert len(lines) <= 20
    whole = f"0-{layers - 1}"
    kinds = [int(line[2].replace(",", "")) for line in lines if line[0] in (whole, "-")]
    ranges = [line for line in lines[1:-1] if line[0] not in (whole, "-")]
    outside = next(int(line[2]) for line in lines if line[0] == "-")
    assert sum(kinds) == sum(int(line[1].replace(",", "")) for line in ranges) + outside == report.total.selected
    assert len({len(line) for line in str(report).splitlines()}) == 1
    assert len(report.table().splitlines()) == 14 * layers + 3


def test_what_cannot_be_reported_is_refused() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8)), SamConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="no SAM adapter 'default' with a support"):
        selection_report(model)
    with pytest.raises(ValueError, match="other='second' names an adapter, which needs a model"):
        selection_report(some_selection(), other="second")


def test_the_picture_is_written(tmp_path: Path) -> None:
    plot_selection(some_selection(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
