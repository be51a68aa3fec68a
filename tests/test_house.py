"""The layout that makes four top-level folders one package: real folders, one link each, no second copies."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cache", "trainer", "eval", "kernels")


@pytest.mark.parametrize("name", FOLDERS)
def test_top_level_folder_is_real_and_linked(name: str) -> None:
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert (ROOT / "src" / "threetowers" / name).resolve() == ROOT / name


def test_imports_do_not_leak_bare_folder_names() -> None:
    code = "import sys, threetowers.cli; print(sorted({'cache', 'trainer', 'eval', 'kernels'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "[]"
