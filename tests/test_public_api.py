"""`import threetowers`: quick, complete, and every example in a docstring runs."""

import subprocess
import sys
from pathlib import Path

import pytest

import threetowers

ROOT = Path(__file__).parent.parent
NAMES = [name for name in threetowers.__all__ if name != "__version__"]


def test_names_are_offered_and_others_are_refused() -> None:
    assert set(NAMES) <= set(dir(threetowers))
    with pytest.raises(AttributeError, match=r"no attribute 'contrast'; public names are \['BuildConfig', "):
        threetowers.contrast  # noqa: B018


@pytest.mark.parametrize("module", ["threetowers", "threetowers.cli"])
def test_importing_takes_nothing_heavy(module: str) -> None:
    heavy = ("torch", "deepspeed", "timm", "faiss", "zarr", "matplotlib", "scipy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_is_that_of_the_package() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "threetowers", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"threetowers {threetowers.__version__}"


RUN = """
import doctest, re, sys, threetowers
value = getattr(threetowers, sys.argv[1])

class Checker(doctest.OutputChecker):  # DeepSpeed reports on stdout that it has compiled an op, once a machine
    def check_output(self, want, got, flags):
        return super().check_output(want, re.sub("^DeepSpeed .*\\n", "", got, flags=re.MULTILINE), flags)

tests = doctest.DocTestFinder().find(value, sys.argv[1], module=sys.modules[value.__module__])
runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
for test in tests:
    runner.run(test)
print(runner.tries, "examples,", runner.failures, "failed")
sys.exit(runner.failures > 0 or runner.tries == 0)
"""


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    """In a process of its own, as a reader would try it, from the repository root."""
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:threetowers", "-c", RUN, name],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, f"{name}: {result.stdout[-3000:]}{result.stderr[-2000:]}"
