"""Fixtures and settings for all tests: one seed each, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.shared.device import on_the_device, skip_unless_it_can_run
from tests.shared.hub_server import hub

__all__ = ["hub"]

# The gate asks the same examples each time; `--hypothesis-profile=explore` looks for new ones, `few` takes a few.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
settings.register_profile("few", deadline=None, derandomize=True, max_examples=4)
settings.load_profile("default")
torch.set_num_threads(1)  # the models are tiny


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest, _seeded: None) -> Iterator[None]:
    marker = request.node.get_closest_marker("on_device")
    if marker is None or marker.args == (False,):
        yield
        return
    skip_unless_it_can_run(request.node.nodeid)
    with on_the_device():
        yield
