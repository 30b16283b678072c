"""Laws of the table and the picture of a selection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_sam import Selection
from peft_sam.report import counts_by_place, place_of, plot_selection


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
    found = counts_by_place(selection)
    assert sum(chosen for chosen, _ in found.values()) == selection.k
    assert sum(candidates for _, candidates in found.values()) == selection.m
    assert found["0", "query"] == (1, 24)


def test_the_picture_is_written(tmp_path: Path) -> None:
    plot_selection(some_selection(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
