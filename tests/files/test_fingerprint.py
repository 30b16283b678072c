"""Laws of the base check: an adapter knows the base model that it was made for."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_sam import OtherBaseWarning, SamConfig
from peft_sam.files.fingerprint import ENTRIES, check_base
from peft_sam.layers.found import sam_layers
from tests.shared.cases import bert


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    base = bert()
    model = get_peft_model(copy.deepcopy(base), SamConfig(task_type="SEQ_CLS", density=0.05, score="random"))
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path, base


def other(base: nn.Module, *changed: str) -> nn.Module:
    found = copy.deepcopy(base)
    with torch.no_grad():
        for name in changed:
            found.get_parameter(name).mul_(1.001)
    return found


def load(base: nn.Module, path: Path, door: str, **options: Any) -> Any:
    """The model with the adapter, through one of three doors."""
    if door == "from_pretrained":
        return PeftModel.from_pretrained(base, path, **options)
    if door == "load_adapter":
        model = get_peft_model(base, SamConfig(task_type="SEQ_CLS", density=0.01, score="random", seed=1))
        model.load_adapter(path, "second", **options)
        return model
    config = PeftConfig.from_pretrained(str(path))
    config.strict_base = options.get("strict_base", False)
    base.load_adapter(str(path), peft_config=config)  # type: ignore[operator]
    return base


DOORS = ["from_pretrained", "load_adapter", "transformers"]
WEIGHT = "bert.encoder.layer.1.attention.self.value.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("door", DOORS)
def test_the_same_base_in_any_dtype_is_the_same(saved: tuple[Path, nn.Module], door: str, dtype: torch.dtype) -> None:
    path, base = saved
    load(copy.deepcopy(base).to(dtype), path, door, strict_base=True)


@pytest.mark.parametrize("made_in", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used_in", [torch.bfloat16, torch.float16, torch.float32])
def test_an_adapter_made_in_half_precision_knows_its_base_in_the_others(
    tmp_path: Path, made_in: torch.dtype, used_in: torch.dtype
) -> None:
    base = bert()
    model = get_peft_model(copy.deepcopy(base).to(made_in), SamConfig(task_type="SEQ_CLS", density=0.2, score="random"))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(copy.deepcopy(base).to(used_in), tmp_path, strict_base=True)
    with pytest.warns(OtherBaseWarning):
        PeftModel.from_pretrained(bert().to(used_in), tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_another_revision_is_named_with_its_layers_and_shares(saved: tuple[Path, nn.Module], door: str) -> None:
    path, base = saved
    with pytest.warns(
        OtherBaseWarning, match=r"1 of \d+ layers .*'bert\.encoder\.layer\.1\.attention\.self\.value' \(\d+%\)"
    ):
        model = load(other(base, WEIGHT), path, door)
    name = "second" if door == "load_adapter" else "default"
    assert any(name in layer.sam_sparse_delta for layer in sam_layers(model).values())


@pytest.mark.parametrize("door", DOORS)
def test_strict_base_makes_it_an_error_and_nothing_is_changed(saved: tuple[Path, nn.Module], door: str) -> None:
    path, base = saved
    base = other(base, WEIGHT)
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match="not the one that the adapter was made for"):
        load(base, path, door, strict_base=True)
    layers = sam_layers(base).values()
    assert not any({"second", "default"} & set(layer.sam_sparse_delta) for layer in layers) or door == "load_adapter"
    assert not any("second" in layer.sam_sparse_delta for layer in layers)
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters()}
    assert all(torch.equal(p, after[name]) for name, p in before.items() if "classifier" not in name)


def test_strictness_belongs_to_the_loader_and_is_not_saved(tmp_path: Path) -> None:
    model = get_peft_model(bert(), SamConfig(density=0.05, score="random", strict_base=True))
    model.save_pretrained(tmp_path)
    assert "strict_base" not in json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.warns(OtherBaseWarning):
        PeftModel.from_pretrained(other(bert(), WEIGHT), tmp_path)


def test_a_fingerprint_holds_a_few_selected_entries_of_each_parameter(saved: tuple[Path, nn.Module]) -> None:
    path, _ = saved
    selection = json.loads((path / "adapter_config.json").read_text())["selection"]
    assert selection["base"].keys() == selection["counts"].keys()
    for name, text in selection["base"].items():
        entries = min(ENTRIES, selection["counts"][name])
        assert len(text) == len("float32 ") + 4 * -(-8 * entries // 3)


def test_what_cannot_be_read_is_not_compared(saved: tuple[Path, nn.Module]) -> None:
    path, base = saved
    model = load(copy.deepcopy(base), path, "load_adapter")
    model.merge_adapter(["default"])
    config = model.peft_config["second"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base(sam_layers(model), config.fingerprints, strict=True)  # merged: other values, but known ones


@pytest.mark.parametrize(
    "text", ["", "float32", "float32 !", "float32 AAAA", "int8 AAAAAAAAAAA=", "float32 /////wAAAAA=", "x" * 10**5]
)
def test_a_damaged_fingerprint_is_refused(saved: tuple[Path, nn.Module], text: str) -> None:
    path, base = saved
    config = PeftConfig.from_pretrained(str(path))
    config.selection["base"][WEIGHT] = text  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"damaged fingerprint for '{WEIGHT}'"):
        PeftModel.from_pretrained(copy.deepcopy(base), path, config=config)


@pytest.mark.parametrize("base_entry", [3, ["a"], {"a": 3}])
def test_fingerprints_that_are_no_texts_are_refused(base_entry: Any) -> None:
    with pytest.raises(ValueError, match="map from parameter name to text"):
        SamConfig(selection={"counts": {"a": 1}, "base": base_entry})
