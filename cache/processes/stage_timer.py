"""Where the time of a thread goes, by stage."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class StageTimer:
    """The time of the embedding thread by stage: the forward pass, or waiting for another stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time inside the context to a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - started

    def shares(self) -> dict[str, float]:
        """Return the share of each stage, largest first; the first is the bottleneck."""
        total = sum(self.seconds.values()) or 1.0
        return {name: seconds / total for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])}
