"""Laws of the model card: nothing of a stranger's gets into it as markup, and it never costs a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_sam import SamConfig
from peft_sam.report import card
from peft_sam.report.card import HEADING, code, section

FILE = "adapter_model.safetensors"


def chosen() -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(6, 8)), SamConfig(target_modules=["0"], score="random", density=0.2))


@given(st.text() | st.text("`|<>\\\n\r\u2028# \t*[](){}&$"))
def test_a_name_stays_one_cell_of_code(text: str) -> None:
    cell = code(text)
    assert cell == "no name" or (cell[0] == cell[-1] == "`" and cell[1:-1].isprintable())
    assert not set(cell[1:-1]) & set("`|<>")
    assert len(cell) <= 202


@given(st.text("`|<>\n# a") | st.text())
def test_the_section_has_the_lines_that_it_has_for_a_plain_name(name: str) -> None:
    def lines(base: str | None) -> list[str]:
        return section(SamConfig(base_model_name_or_path=base), "").splitlines()

    plain, found = lines("org/model"), lines(name)
    assert len(plain) == len(found)
    assert [a for a, b in zip(plain, found, strict=True) if a != b] in ([], ["| base model | `org/model` |"])


def test_the_card_names_the_parts_of_a_hostile_module_name_as_code(tmp_path: Path) -> None:
    base = nn.Module()
    base.add_module("a`|<img src=x>\n# Urgent", nn.Linear(4, 4))
    model = get_peft_model(base, SamConfig(target_modules="all", score="random", density=0.5))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "<img" not in text
    assert "\n# Urgent" not in text


def test_an_adapter_is_saved_whatever_happens_to_its_card_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    model = chosen()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.warns(UserWarning, match="no picture of the selection in the model card: .*disk full"):
            model.save_pretrained(tmp_path / "no picture")
    assert HEADING in (tmp_path / "no picture" / "README.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(card, "section", fails)
        with pytest.warns(UserWarning, match="the model card says nothing of the sparse adapter: .*disk full"):
            model.save_pretrained(tmp_path / "no section")
    assert all((tmp_path / folder / FILE).exists() for folder in ("no picture", "no section"))


@pytest.mark.parametrize("positional", [False, True])
def test_the_card_is_of_an_adapter_that_is_saved(tmp_path: Path, positional: bool) -> None:
    model: Any = chosen()
    model.add_adapter("b", SamConfig(target_modules=["0"], score="random", density=0.5))
    model.save_pretrained(tmp_path, True, ["b"]) if positional else model.save_pretrained(
        tmp_path, selected_adapters=["b"]
    )
    (k,) = {model.peft_config["b"].selection["k"]} - {model.peft_config["default"].selection["k"]}
    assert f"{k:,} of" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert f"{k:,} of" not in (tmp_path / "README.md").read_text()
