"""Laws of what a config from a stranger may say of a selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_sam import SamConfig
from peft_sam.recorded import COUNTED, MEASURED, check_selection, shown

RIGHT = {"counts": {"a.weight": 2, "b.bias": 1}, "k": 3, "m": 30, "score": "sam", "budget": "global", "threshold": 0.5}
DEEP: Any = [1]
for _ in range(500):
    DEEP = [DEEP]
MARKUP = ["`", "a|b", "<img src=x>", "# Urgent", "line\nline", "", "é", "x" * 65, "\x1b[2J", "a b"]
NO_NUMBERS = ["x", "1", [1], {"a": 1}, None, True, float("nan"), float("inf"), -1, -0.5, 2**63, 10**400, DEEP]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=shown)
@pytest.mark.parametrize("name", COUNTED + MEASURED)
def test_where_a_number_is_expected_nothing_else_is_taken(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`selection` of a SamConfig has '{name}'") as error:
        SamConfig(selection={**RIGHT, name: value})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["score", "budget", "of_a_newer_version"])
@pytest.mark.parametrize("text", MARKUP, ids=shown)
def test_texts_are_single_words(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"has '{name}'"):
        SamConfig(selection={**RIGHT, name: text})
    with pytest.raises(ValueError, match="has "):
        SamConfig(selection={**RIGHT, text: 1})


@pytest.mark.parametrize("value", ["word", 3, 0.5, True, None], ids=shown)
def test_a_newer_version_may_say_more(value: Any) -> None:
    assert SamConfig(selection={**RIGHT, "more": value}).selection == {**RIGHT, "more": value}


@pytest.mark.parametrize(
    "counts", [{"a": 0}, {"a": True}, {"a": 1.0}, {"a": 2**63}, {"a": "1"}, {"a" * 1001: 1}, {}, [], DEEP], ids=shown
)
def test_counts_are_positive_numbers_of_named_parameters(counts: Any) -> None:
    with pytest.raises(ValueError, match="selection") as error:
        SamConfig(selection={"counts": counts})
    assert len(str(error.value)) < 500


def test_the_sum_of_the_counts_is_k() -> None:
    with pytest.raises(ValueError, match=r"k = 4 entries in all and 3 under 'counts'"):
        check_selection({**RIGHT, "k": 4})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("score", "budget", "counts", "base", "format", *COUNTED, *MEASURED)


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), JSON, max_size=5))
def test_whatever_json_says_is_refused_in_words_or_can_be_saved_again(changes: dict[str, Any]) -> None:
    message = ""
    try:
        config = SamConfig(selection={**RIGHT, **changes})
        assert json.loads(json.dumps(config.to_dict()["selection"], allow_nan=False))["counts"] == config.counts
    except ValueError as error:
        message = str(error)
    assert not message or "selection" in message or "file format" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_model_name_or_path", [1]), ("revision", {"a": 1}), ("seed", 10**400), ("probes", 10**400)],
)
def test_other_fields_of_a_config_have_their_types(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        SamConfig(**{field: value})


def test_a_regular_expression_too_deep_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="target_modules is no regular expression"):
        SamConfig(target_modules="(" * 20_000 + ")" * 20_000)


def test_what_a_config_may_say_comes_back_from_a_saved_adapter(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    model: Any = get_peft_model(base, SamConfig(target_modules=["0"], score="random", density=0.5))
    model.peft_config["default"].selection["more"] = "word"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).selection["more"] == "word"
    assert loaded.peft_config["default"].selection["more"] == "word"
