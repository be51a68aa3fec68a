"""A run's metrics in Trackio."""

from typing import Any

from threetowers.trainer.monitoring.tracker import (
    Metrics,
    TrackedRun,
    Tracker,
    cannot_start,
    import_tracker,
    logged,
)


class TrackioLog(Tracker):
    """A run of a project, found again by its name, which ends in its id, when it resumes.

    Where it lies is said by Trackio's own environment variables: TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL.
    """

    def __init__(self, project: str, run: TrackedRun, config: dict[str, Any]) -> None:
        """Begin or resume.

        Args:
            project: Its name.
            run: Which run of it.
            config: The run's config, as a plain tree.

        Raises:
            ConfigError: Trackio is not installed, or refuses to begin.
        """
        trackio = import_tracker("trackio")
        try:
            name = f"{run.name}-{run.id}"
            self._run: Any = trackio.init(project=project, name=name, resume="allow", config=config, embed=False)
        except Exception as error:  # of kinds of its own
            raise cannot_start("trackio", error) from error

    def write(self, metrics: Metrics) -> None:
        """Send one step's metrics."""
        self._run.log(logged(metrics), step=metrics["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
