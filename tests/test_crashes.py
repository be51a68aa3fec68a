"""A test that dies, or hangs where no exception reaches it, is named while the others go on."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = """
import os, signal, time

def test_first(): pass

def test_second(): pass

def test_that_dies():
    os.kill(os.getpid(), signal.SIGKILL)

def test_that_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as in compiled code, which sees no signal
    time.sleep(100)

def test_last(): pass
"""


def test_the_test_in_which_a_worker_died_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["faulthandler_timeout=2", "faulthandler_exit_on_timeout=true", "timeout=1"]
    plugins = ["tests.crashes", "xdist", "pytest_timeout"]
    command = [sys.executable, "-m", "pytest", "--numprocesses", "1", f"--rootdir={tmp_path}"]
    settings = [part for option in options for part in ("-o", option)]
    settings += [part for plugin in plugins for part in ("-p", plugin)]
    result = subprocess.run(
        [*command, *settings, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    died, _, hung = result.stdout.partition("=== FAILURES ===")[0].partition("replacing crashed worker gw0")
    assert "crashed while running 'test_some.py::test_that_dies'\nbefore that it ran, the latest first:\n" in died
    assert "    test_some.py::test_second\n    test_some.py::test_first\n" in died
    assert "crashed while running 'test_some.py::test_that_hangs'" in hung
    assert "in test_that_hangs" in result.stderr  # where it stood
    assert "2 failed, 3 passed" in result.stdout


def test_no_test_is_ended_as_hung_before_its_own_limit() -> None:
    """The limit of faulthandler is one for all tests; after its own a test still needs some time to clean up."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    own = [int(seconds) for source in sources for seconds in re.findall(r"mark\.timeout\((\d+)\)", source)]
    assert own
    assert options["faulthandler_timeout"] >= max(*own, options["timeout"]) + 30
