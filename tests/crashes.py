"""Says at once which test a worker of pytest-xdist died in, and what it had run before.

A heap that one test corrupts kills a later one, so the tests before it are suspects too. xdist alone names the test at
the end of the run, which a run that is cut off does not reach.
"""

from collections import defaultdict, deque

import pytest

SUSPECTS = 5  # tests that are named beside the one that died
_ran: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=SUSPECTS))  # by worker, the latest last


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what each worker has run; without xdist there is none."""
    worker = getattr(report, "node", None)
    if worker is not None and report.when == "teardown":
        _ran[worker.gateway.id].append(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: pytest.TestReport) -> None:
    """Add the suspects to xdist's report of the crash, and print it now."""
    worker = report.node  # type: ignore[attr-defined]
    before = "".join(f"\n    {nodeid}" for nodeid in reversed(_ran[worker.gateway.id]))
    report.longrepr = f"{report.longrepr}" + (f"\nbefore that it ran, the latest first:{before}" if before else "")
    terminal = worker.config.pluginmanager.get_plugin("terminalreporter")
    terminal.ensure_newline()
    terminal.write_line(report.longrepr, red=True)
