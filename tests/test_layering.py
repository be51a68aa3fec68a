"""The layout that makes four top-level folders one package: real folders, one link each, no second copies."""

import re
import shutil
import subprocess
import sys
import zipfile
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


def test_a_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Links become files: every module, and what the package reads beside its modules."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "tests", "*.tar", "*.so", "*.egg-info", ".*_cache"
    )
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    ]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    found = {name.removeprefix("threetowers/") for name in zipfile.ZipFile(wheel).namelist()}
    expected = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for pattern in ("*.py", "cuda/*.cu", "cuda/*.h", "*.html")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert len(expected) > 50
    assert expected - found == set()
    assert {"cli.py", "__main__.py", "py.typed"} <= found


def test_imports_go_down_only() -> None:
    """cli -> eval -> trainer -> cache, kernels; the last two import none of the others.

    The cli.py of each package belongs to the top layer, so only the command line itself imports it.
    """
    below = {"cache": set(), "kernels": set(), "trainer": {"cache", "kernels"}, "eval": {"cache", "kernels", "trainer"}}
    for folder, allowed in below.items():
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            used = set(re.findall(r"^\s*(?:from|import) threetowers\.(\w+)", text, re.MULTILINE))
            assert path == ROOT / folder / "cli.py" or used <= allowed | {folder}, path
            assert not re.search(r"^\s*(?:from|import) threetowers\.\w+(?:\.cli\b| import cli\b)", text, re.MULTILINE)
