"""Numbers as texts of tables: fractions become percents and points."""

from reproduce.claims import MeasuredDifference
from threetowers.eval.metrics.bootstrap import ConfidenceInterval

NOT_AVAILABLE = "-"


def percent_text(interval: ConfidenceInterval | None) -> str:
    """Return a score with its interval, in percent."""
    if interval is None:
        return NOT_AVAILABLE
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points_text(interval: ConfidenceInterval, factor: float = 100) -> str:
    """Return a difference with its interval, in points."""
    return f"{factor * interval.mean:+.1f} [{factor * interval.low:+.1f}, {factor * interval.high:+.1f}]"


def difference_cells(measured: MeasuredDifference) -> list[str]:
    """Return two means, their difference in points, its interval and the seeds, a cell each."""
    mean, _, interval = points_text(measured.difference).partition(" ")
    first, second = measured.means
    return [f"{100 * first:.1f}", f"{100 * second:.1f}", mean, interval, str(measured.seeds)]
