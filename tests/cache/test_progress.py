"""Progress: a line in the log now and then, with the time left; on a terminal a bar."""

import io
import logging
import re
import sys

import pytest

from threetowers.cache.processes.progress import progress_bar


def test_lines_in_a_log_tell_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    with caplog.at_level(logging.INFO, "threetowers"), progress_bar("cache build", 400, "images", initial=40) as bar:
        bar._time = lambda: now
        bar.start_t = bar.last_print_t = now
        for _ in range(18):
            now += 10
            bar.set_postfix_str("decode 60%", refresh=False)
            bar.update(10)
    lines = [record.getMessage() for record in caplog.records]
    # One each half minute, none at the beginning and the end: 10 images in 10 s
    assert len(lines) == 6
    assert lines[0] == "cache build: 70 of 400 images, 1.00 images/s, 05:30 left, decode 60%"
    assert lines[-1].startswith("cache build: 220 of 400 images, 1.00 images/s, 03:00 left")


def test_short_work_and_work_that_is_not_shown_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "threetowers"):
        for enabled in (True, False):
            with progress_bar("embed", None, "images", enabled=enabled) as bar:
                bar.update(3)
    assert not caplog.records


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("cache verify", 4, "tars", keep=True) as bar:
        bar.update(4)
    assert re.search(r"cache verify: 100%\|.*\| 4/4 \[00:00<00:00", terminal.getvalue())
