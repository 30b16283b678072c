"""Laws of what rounding takes from an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sam import PendingAdapterError, SamConfig, export_adapter, rounding_report
from tests.export.test_export import RANDOM, Saved, assert_same_bits, bits
from tests.layers.test_quantised import quantised
from tests.shared.cases import Sequential, bert, llama, mixtral

IDS = torch.arange(1, 13).view(2, 6)


def scaled(model: Any, factor: float) -> Any:
    for delta in model.base_model.sparse_deltas().values():
        delta.values.data.mul_(factor)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1e-3, 0.02, 1.0])
def test_unmoved_entries_and_the_error_are_those_of_the_merged_weights(
    dtype: torch.dtype, factor: float, tmp_path: Path
) -> None:
    saved = Saved(tmp_path, mixtral, dtype, target_modules="all")
    model = scaled(saved.model, factor)
    before, report = bits(model), rounding_report(model)
    assert_same_bits(bits(model), before)
    deltas, start, goal = model.base_model.sparse_deltas(), saved.load().state_dict(), saved.merged()
    left = {name: (goal[name].double() - start[name].double()).flatten()[d.indices] for name, d in deltas.items()}
    entries = sum(int((delta.values != 0).sum()) for delta in deltas.values())
    assert report.entries == entries
    assert report.unmoved == sum(int((moved == 0).sum()) for moved in left.values()) / entries
    missing = sum(float((left[name] - d.values.detach().double()).square().sum()) for name, d in deltas.items())
    whole = sum(float(d.values.detach().double().square().sum()) for d in deltas.values())
    assert report.error == pytest.approx((missing / whole) ** 0.5)
    assert str(report).startswith(
        f"stored as {str(dtype)[6:]}, {report.unmoved:.2%} of {entries:,} entries do not move"
    )


def test_what_a_small_delta_does_to_the_logits_is_lost_in_half_precision(tmp_path: Path) -> None:
    model = Saved(tmp_path, llama).model
    found = [rounding_report(scaled(model, f), dtype=torch.bfloat16, batch={"input_ids": IDS}) for f in (1.0, 1e-4)]
    assert found[0].unmoved < 0.2 < 0.9 < found[1].unmoved
    assert found[0].logits is not None
    assert found[1].logits is not None
    assert found[0].logits < 0.1
    assert found[1].logits > 0.5
    alone = rounding_report(model, batch={"input_ids": IDS})
    assert (alone.stored, alone.logits) == ("float32", pytest.approx(0.0, abs=0.05))


def test_the_error_of_the_logits_is_that_of_the_rounded_model(tmp_path: Path) -> None:
    saved = Saved(tmp_path, bert, target_modules="all")
    report = rounding_report(saved.model, dtype=torch.bfloat16, batch={"input_ids": IDS})
    start = saved.load().bfloat16().float()
    with_delta, left = copy.deepcopy(start), copy.deepcopy(start)
    for name, delta in saved.model.base_model.sparse_deltas().items():
        exact, before = with_delta.get_parameter(name), saved.load().get_parameter(name)
        exact.data.view(-1)[delta.indices] += delta.values.detach()
        rounded = (before.detach().flatten()[delta.indices] + delta.values.detach()).bfloat16()
        left.get_parameter(name).data.view(-1)[delta.indices] = rounded.float()
    with torch.no_grad():
        without, whole, rest = (model(IDS).logits for model in (start, with_delta, left))
    assert report.logits == pytest.approx(float((rest - whole).norm() / (whole - without).norm()), rel=1e-3)


class Net(Sequential):
    """Its output has logits."""

    def forward(self, x: Any) -> Any:
        return SimpleNamespace(logits=super().forward(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Merging into a quantised weight")
@pytest.mark.parametrize("kind", ["4 bits", "hqq"])
@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_what_codes_cannot_say_is_measured_by_merging_and_nothing_is_changed(kind: str, factor: float) -> None:
    config = SamConfig(target_modules=["0"], density=0.1, **RANDOM)
    # in eval mode: bitsandbytes packs its weights anew at the first pass of that kind, for a kernel that rounds more
    model: Any = get_peft_model(quantised(kind, Net(nn.Linear(64, 64))), config).eval()
    deltas = scaled(model, factor).base_model.sparse_deltas()
    if "0.bias" in deltas:
        deltas["0.bias"].values.zero_()
    delta, eye = deltas["0.weight"], torch.eye(64)
    with model.disable_adapter():
        without = model(eye).logits
    whole = model(eye).logits
    report = rounding_report(model, batch={"x": eye})
    assert torch.equal(model(eye).logits, whole)
    model.merge_adapter()
    left = model(eye).logits
    if factor > 1:  # or the kernel's own rounding is seen, too
        assert report.error == pytest.approx(float((left - whole).norm() / delta.values.norm()), rel=0.1)
    else:
        assert report.error > 0.5
    assert report.logits == pytest.approx(float((left - whole).norm() / (whole - without).norm()), rel=1e-3)
    if kind == "4 bits":  # hqq fits its scales anew, and moves every entry
        assert report.unmoved > 0.6 if factor < 1 else report.unmoved < 0.2
    model.unmerge_adapter()
    with pytest.raises(ValueError, match=r"dtype is for plain weights, and '0\.weight' is not"):
        rounding_report(model, dtype=torch.bfloat16)


def test_an_export_reports_it(tmp_path: Path) -> None:
    saved = Saved(tmp_path, llama, torch.bfloat16)
    scaled(saved.model, 1e-3)
    for format in ("merged", "checkpoint_patch", "supertuning"):
        report = export_adapter(saved.model, tmp_path / format, format, batch={"input_ids": IDS})
        assert report.rounding == rounding_report(saved.model, batch={"input_ids": IDS})
        assert f"{report.rounding}" in str(report)
    with pytest.raises(PendingAdapterError):
        rounding_report(get_peft_model(llama(), SamConfig()))
