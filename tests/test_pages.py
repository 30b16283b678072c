"""Laws of the pages: the support matrix has the rows of the code, each shown by a test; they are whole, and short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from peft import get_peft_model

import peft_sam
from peft_sam import SamConfig, SamLayer
from peft_sam.export.formats import FORMATS
from peft_sam.layers.make import LAYERS
from peft_sam.scores import SCORES
from tests.layers.test_compile import COMPILABLE
from tests.layers.test_quantised import KINDS, WRITABLE
from tests.shared.cases import FAMILIES, MODULES, ModuleCase, names
from tests.test_architecture import BETWEEN

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
MATRIX = ROOT / "docs" / "support.md"
LINK = re.compile(r"\[`(\w+)`\]\((\S+)\)")


def tables(page: Path) -> dict[str, list[list[str]]]:
    """Heading → the cells of the rows of the table below it, without the head."""
    found: dict[str, list[list[str]]] = {}
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    heading, kind = "", ""
    for token in tokens:
        if token.type == "tr_open" and kind == "tbody_open":
            found.setdefault(heading, []).append([])
        elif token.type in ("heading_open", "thead_open", "tbody_open", "tbody_close"):
            kind = token.type
        elif token.type == "inline" and kind == "heading_open":
            heading, kind = token.content, ""
        elif token.type == "inline" and kind == "tbody_open":
            found[heading][-1].append(token.content)
    return found


TABLES = tables(MATRIX)


def column(heading: str, number: int = 0) -> list[str]:
    return [row[number].strip("`") for row in TABLES[heading]]


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_a_module_s_row_says_which_layers_adapt_it_and_whether_it_compiles(case: ModuleCase) -> None:
    config = SamConfig(target_modules=case.target_modules, score="random", density=0.3)
    layers = {type(m).__name__ for m in get_peft_model(case.make(), config).modules() if isinstance(m, SamLayer)}
    said = ", ".join(f"`{name}`" for name in sorted(layers))
    assert [case.name, said, "yes" if case in COMPILABLE else "no"] in TABLES["Layer kinds"]


def test_all_layer_kinds_families_quantisers_scores_and_formats_have_rows_and_nothing_else_has() -> None:
    assert column("Layer kinds") == [case.name for case in MODULES]
    assert {layer.__name__ for layer in LAYERS.values()} < set(re.findall(r"\w+", str(column("Layer kinds", 1))))
    assert [name for row in column("Model families") for name in row.split(", ")] == [case.name for case in FAMILIES]
    quantised = {row[0]: row[1] for row in TABLES["Quantised and offloaded bases"]}
    for kind in KINDS:
        (row,) = (name for name in quantised if f"`{kind}`" in name)
        assert (quantised[row] == "rounded") == (kind in WRITABLE), row
    assert column("Scores") == list(SCORES)
    assert [row == "none" for row in column("Scores", 1)] == [not score.statistics for score in SCORES.values()]
    assert column("Export formats") == list(FORMATS)
    assert column("Export formats", 1) == [row.what for row in FORMATS.values()]


@pytest.mark.parametrize("heading", [heading for heading in TABLES if heading != "Layer kinds"])
def test_each_row_names_a_test_that_there_is(heading: str) -> None:
    for row in TABLES[heading]:
        shown = LINK.findall(row[-1])
        assert shown, row
        for test, file in shown:
            assert f"\ndef {test}(" in (MATRIX.parent / file).read_text(), row


def test_the_page_of_the_house_has_its_rooms_and_what_they_import() -> None:
    (rows,) = tables(ROOT / "docs" / "house.md").values()
    said = {room.strip("`"): set(re.findall(r"`(\w+)`", imported)) for room, _, imported in rows}
    assert said == {room: imported for room, imported in BETWEEN.items() if room != "__init__"}


def test_everything_public_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in peft_sam.__all__ if f":: peft_sam.{name}\n" not in text] == []


def words(page: Path) -> int:
    return sum(any(map(str.isalnum, word)) for word in page.read_text().split())


def test_the_front_door_is_on_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    assert words(ROOT / "README.md") <= 1400


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_answers_one_question_and_the_index_leads_to_it(page: Path) -> None:
    assert words(page) <= 800 or page == MATRIX
    assert page.stem == "index" or f"({page.name})" in (ROOT / "docs" / "index.md").read_text()
