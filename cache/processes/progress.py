"""Progress of long work, with the time left: a bar on a terminal, elsewhere a line in the log now and then."""

import io
import logging
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # between two lines in the log
LOG_FORMAT = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"

if TYPE_CHECKING:
    Bar = tqdm[Any]
else:
    Bar = tqdm


class _LogBar(Bar):
    """A bar that writes each of its states as a line."""

    monitor_interval = 0  # no thread that refreshes it


class _LogLines(io.TextIOBase):
    """The log as a file, for a bar."""

    def write(self, text: str) -> int:
        """Log a line, without what moves a cursor; nothing for an empty one, by which a bar is wiped out."""
        if line := " ".join(text.split()):
            logger.info("%s", line)
        return len(text)


def progress_bar(
    description: str, total: int | None, unit: str, *, initial: int = 0, enabled: bool = True, keep: bool = False
) -> Bar:
    """Return a bar, a context whose `update(n)` says that n more units are done.

    Args:
        description: What is done.
        total: How many units there are; None: unknown, and so is the time left.
        unit: What is counted, in the plural.
        initial: Units that were done before.
        enabled: Whether to show anything.
        keep: Leave the bar on the terminal when it is done.
    """
    common: dict[str, Any] = {"desc": description, "total": total, "initial": initial, "unit": f" {unit}"}
    if sys.stderr.isatty() or not enabled:
        return tqdm(leave=keep, disable=not enabled, **common)
    return _LogBar(
        leave=False,
        file=_LogLines(),
        bar_format=LOG_FORMAT,
        delay=LOG_SECONDS,  # before the first line
        mininterval=LOG_SECONDS,
        maxinterval=LOG_SECONDS,
        miniters=1,
        **common,
    )
