"""Laws of the house: imports go down, the wings do not know each other, private names use one door."""

from __future__ import annotations

import ast
from pathlib import Path

import peft_sam

PACKAGE = Path(peft_sam.__file__).parent

# From the ground up; a file imports only from floors below its own. The two wings share no floor.
GROUND = ["_peft", "sparse.support", "scores", "selection", "config"]
CHOOSING = [
    "choosing.processes",
    "choosing.shards",
    "choosing.threshold",
    "choosing.curvature",
    "choosing.linear_calls",
    "choosing.sums",
    "choosing.gradients",
    "choosing.dense",
    "choosing.movement",
    "choosing.choose",
    "choosing.groups",
]
ADAPTING = [
    "sparse.coding",
    "sparse.delta",
    "layers.substitute",
    "layers.owned",
    "layers.replicas",
    "sparse.scratch",
    "sparse.plan",
    "sparse.products",
    "sparse.ops",
    "layers.quantised",
    "layers.merging",
    "layers.mixed",
    "layers.base",
    "layers.linear",
    "layers.embedding",
    "layers.make",
    "tuner.targets",
    "tuner.ties",
    "files.checkpoint",
    "files.fingerprint",
    "tuner.candidates",
    "tuner.fastpath",
    "tuner.injection",
    "tuner.arithmetic",
    "tuner.model",
    "tuner.hotswap",
]
STAIRS = [
    "report.report",
    "report.card",
    "selecting.batches",
    "selecting.twin",
    "selecting.passes",
    "selecting.select",
    "export.parts",
    "export.stock_sparse",
    "export.low_rank",
    "export.base_files",
    "export.checkpoint_patch",
    "export.formats",
    "export",
    "__init__",
]


# floor → file; a folder's floor is its __init__
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> set[str]:
    tree = ast.parse(FILES[name].read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_sam"):
            module = (node.module or "").removeprefix("peft_sam").removeprefix(".")
            found |= {module} if module else {alias.name for alias in node.names}
    return found


def test_every_file_has_its_floor() -> None:
    rooms = {"sparse", "layers", "choosing", "files", "tuner", "report", "selecting"}
    assert set(FILES) - rooms == {*GROUND, *CHOOSING, *ADAPTING, *STAIRS}


def test_imports_go_down_and_the_wings_do_not_import_each_other() -> None:
    for wing in (CHOOSING, ADAPTING):
        order = GROUND + wing
        for position, name in enumerate(order):
            assert imports(name) <= set(order[:position]), name
    for position, name in enumerate(STAIRS[:-1]):
        assert imports(name) <= {*GROUND, *CHOOSING, *ADAPTING, *STAIRS[:position]}, name


def test_private_names_of_peft_come_through_one_door() -> None:
    for path in FILES.values():
        if path.stem != "_peft":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
                    assert node.module in ("peft", "peft.config", "peft.utils"), path
                    assert not any(alias.name.startswith("_") for alias in node.names), path


def test_a_file_fits_a_reader_s_head() -> None:
    for path in FILES.values():
        assert len(path.read_text().splitlines()) <= 330, path
