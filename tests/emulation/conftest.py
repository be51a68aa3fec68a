"""The emulator's builds are stored in pytest's cache folder, keyed by a digest of their sources."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # emulator.py and tiles_under_test.py are imported by their names


@pytest.fixture(scope="session")
def builds(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of compiled kernels, which are reused by later runs unless pytest runs without its cache."""
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("emulation") if cache is None else cache.mkdir("emulation")
