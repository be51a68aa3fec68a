"""Numbers as they stand in the tables: fractions become percents and points."""

from threetowers.eval.metrics.bootstrap import ConfidenceInterval, PairedDifference

ABSENT = "-"


def percent(interval: ConfidenceInterval | None) -> str:
    """A score with its interval."""
    if interval is None:
        return ABSENT
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: ConfidenceInterval, factor: float = 100) -> str:
    """A difference with its interval."""
    low, high = factor * interval.low, factor * interval.high
    return f"{factor * interval.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def compared(means: tuple[float, float], difference: PairedDifference, seeds: int) -> list[str]:
    """Two means, their difference in points, its interval and the seeds."""
    mean, _, bounds = points(difference).partition(" ")
    return [*(f"{100 * mean:.1f}" for mean in means), mean, bounds, str(seeds)]
