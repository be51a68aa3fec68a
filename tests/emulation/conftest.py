"""The emulator's builds live in pytest's cache folder, keyed by what they are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # emulator.py and tiles_under_test.py are imported by their names


@pytest.fixture(scope="session")
def builds(pytestconfig: pytest.Config) -> Path:
    """Where compiled kernels are kept between runs."""
    return pytestconfig.cache.mkdir("emulation")
