"""Fixtures and settings for all tests: one seed each, one thread, no hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from tests.hub_server import hub

__all__ = ["hub"]

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
torch.set_num_threads(1)  # the models are tiny


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
