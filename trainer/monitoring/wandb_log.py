"""A run's metrics in Weights & Biases."""

from pathlib import Path
from typing import Any

from threetowers.trainer.monitoring.tracker import (
    Metrics,
    TrackedRun,
    Tracker,
    cannot_start,
    import_tracker,
    logged,
)


class WandbLog(Tracker):
    """A run of a project, found again by its id when it resumes.

    The axis is the step of training, as a metric: wandb's own counter would refuse steps that a resumed run repeats.
    Where it sends to, or that it only writes below the run's folder, is said by its own environment variables
    (WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE=offline, ...).
    """

    def __init__(self, project: str, run: TrackedRun, config: dict[str, Any], folder: Path) -> None:
        """Begin or resume.

        Args:
            project: Its name.
            run: Which run of it.
            config: The run's config, as a plain tree.
            folder: The run's local folder.

        Raises:
            ConfigError: wandb is not installed, or refuses to begin, without a login for instance.
        """
        wandb = import_tracker("wandb")
        try:
            self._run: Any = wandb.init(
                project=project, id=run.id, name=run.name, resume="allow", config=config, dir=str(folder)
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of kinds of its own
            raise cannot_start("wandb", error) from error

    def write(self, metrics: Metrics) -> None:
        """Send one step's metrics."""
        self._run.log(logged(metrics) | {"step": metrics["step"]})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
