"""Laws of the versions that are supported: what is declared is what is tested."""

from __future__ import annotations

import configparser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peft_sam import _peft

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = {extra: [Requirement(line) for line in of.split()] for extra, of in SETUP["options.extras_require"].items()}
DECLARED = {r.name: r for r in map(Requirement, SETUP["options"]["install_requires"].split())}


def lowest(requirement: Requirement) -> str:
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return bound


def pinned(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    oldest = pinned(".ci/oldest.txt")
    assert {name: oldest[name] for name in DECLARED} == {name: lowest(of) for name, of in DECLARED.items()}


@pytest.mark.parametrize("name", DECLARED)
def test_the_pinned_and_the_installed_versions_are_in_the_declared_range(name: str) -> None:
    assert pinned("constraints.txt")[name] in DECLARED[name].specifier
    assert version(name).partition("+")[0] in DECLARED[name].specifier


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_an_extra_needs_is_pinned_in_its_range(extra: str) -> None:
    pins = pinned("constraints.txt")
    assert [str(need) for need in EXTRAS[extra] if need.name not in pins or pins[need.name] not in need.specifier] == []


def test_the_test_command_installs_what_builds_the_pages() -> None:
    assert {str(need) for need in EXTRAS["docs"]} <= {str(need) for need in EXTRAS["test"]}


def test_the_error_of_a_moved_name_tells_the_declared_range_of_peft() -> None:
    assert Requirement(_peft.SUPPORTED_PEFT) == DECLARED["peft"]


def test_the_lowest_python_is_the_one_that_the_code_is_checked_for() -> None:
    lowest_python = SETUP["options"]["python_requires"].removeprefix(">=")
    assert f'target-version = "py{lowest_python.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    assert f'python_version = "{lowest_python}"' in (ROOT / "pyproject.toml").read_text()
