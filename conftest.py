"""The code on the README and the pages is run as tests, too."""

from tests.shared.pages import pytest_collect_file

__all__ = ["pytest_collect_file"]
