"""Laws of the house: imports go down, the wings do not know each other, PEFT's private names use one door."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_sam

PACKAGE = Path(peft_sam.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imports(path: Path) -> Iterator[tuple[str, ast.ImportFrom]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", node


def inner(name: str) -> set[str]:
    """The files of the package that one imports."""
    found = {module.removeprefix("peft_sam.") for module, _ in imports(FILES[name]) if module.startswith("peft_sam.")}
    return {file if file in FILES else f"{file}.__init__" for file in found}


def room(name: str) -> str:
    return name.split(".")[0]


GRAPH = {name: inner(name) for name in FILES if name != "__init__"}
BETWEEN = {r: {room(to) for name in GRAPH if room(name) == r for to in GRAPH[name]} - {r} for r in map(room, GRAPH)}


def below(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    return graph[start].union(*(below(name, graph) for name in graph[start]))


def test_imports_go_down_between_files_and_between_rooms() -> None:
    for graph in (GRAPH, BETWEEN):
        TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_the_wings_do_not_know_each_other() -> None:
    assert not below("choosing", BETWEEN) & {"layers", "files", "tuner", "_peft", "config"}
    assert not below("tuner", BETWEEN) & {"choosing", "selecting"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_says_whom_it_imports_and_who_imports_it(name: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
    said = dict(re.findall(r"^(Imports|Imported by):? ([^.]*)\.$", text, re.MULTILINE))
    by = {other for other, of in BETWEEN.items() if name in of}
    for key, true in (("Imports", BETWEEN[name]), ("Imported by", by)):
        none = said[key].startswith("nobody" if key == "Imported by" else "nothing")
        assert (set() if none else set(said[key].split(", "))) == true, key
    missing = [file for file in FILES if room(file) == name and f"`{file.partition('.')[2]}`" not in text]
    assert missing == [f"{name}.__init__"], "files that the room does not name"


def test_private_names_of_peft_come_through_one_door() -> None:
    for name, path in FILES.items():
        for module, node in imports(path):
            if module.split(".")[0] == "peft" and room(name) != "_peft":
                assert module in ("peft", "peft.config", "peft.utils"), name
                assert not any(alias.name.startswith("_") for alias in node.names), name


def test_the_hall_is_small_and_a_file_fits_a_reader_s_head() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    for path in FILES.values():
        assert len(path.read_text().splitlines()) <= 300, path
