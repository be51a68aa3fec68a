"""The layout that makes four top-level folders one package: real folders, one link each, no second copies."""

import ast
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
    """Cli -> eval -> trainer -> cache, kernels; the last two import neither of the others.

    The cli.py of each package belongs to the top layer, so only the command line itself imports it.
    """
    below = {"cache": set(), "kernels": set(), "trainer": {"cache", "kernels"}, "eval": {"cache", "kernels", "trainer"}}
    for folder, allowed in below.items():
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            used = set(re.findall(r"^\s*(?:from|import) threetowers\.(\w+)", text, re.MULTILINE))
            assert path == ROOT / folder / "cli.py" or used <= allowed | {folder}, path
            assert not re.search(r"^\s*(?:from|import) threetowers\.\w+(?:\.cli\b| import cli\b)", text, re.MULTILINE)


MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_public_names_are_unique() -> None:
    """Classes and functions of the whole package; a command may be called like what it runs."""
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if is_public and not (path.name == "cli.py" and isinstance(node, ast.FunctionDef)):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice


def test_folders_stay_small() -> None:
    """At most fifteen modules and folders beside each other, and never one alone."""
    for folder in {path.parent for path in MODULES}:
        siblings = [
            entry.name
            for entry in folder.iterdir()
            if (entry.suffix == ".py" and entry.name != "__init__.py") or (entry / "__init__.py").exists()
        ]
        assert 1 < len(siblings) <= 15, f"{folder.relative_to(ROOT)}: {sorted(siblings)}"


def test_every_module_has_a_docstring() -> None:
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_every_command_has_its_file() -> None:
    """`threetowers eval knn` is in eval/.../knn.py, `threetowers cache build` in a file or folder of that name."""
    named = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    for command in commands():
        words = command.split()
        wanted = words[-1].replace("-", "_") if words[0] in ("cache", "eval") else words[0]
        places = [name for name in named if name == wanted or name.startswith(f"{wanted}er")]
        assert places, f"threetowers {command}: no file or folder is called {wanted}"


def commands() -> list[str]:
    """Return every command of the command line, as its help lists them."""

    def listed(*words: str) -> list[str]:
        command = [sys.executable, "-m", "threetowers", *words, "--help"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"\{([a-z,\s-]+)\}", usage.partition("options")[0])
        return [] if found is None else re.sub(r"\s", "", found.group(1)).split(",")

    found = []
    for command in listed():
        found += [f"{command} {inner}" for inner in listed(command)] or [command]
    assert len(found) > 15
    return found
