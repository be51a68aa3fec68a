"""Metrics of a run: a readable line and a JSON line per logged step, which trackers are told, too."""

import json
import logging
import math

from tqdm import tqdm

from threetowers.cache.storage.atomic import write_atomic
from threetowers.trainer.config import TrainConfig, dump
from threetowers.trainer.monitoring.tensorboard_log import TensorboardLog
from threetowers.trainer.monitoring.tracker import Metrics, TrackedRun, Tracker
from threetowers.trainer.monitoring.trackio_log import TrackioLog
from threetowers.trainer.monitoring.wandb_log import WandbLog
from threetowers.trainer.run.run_folder import RunFolder

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes `metrics.jsonl` and tells the trackers that the config names. For the first rank only."""

    def __init__(self, folder: RunFolder, config: TrainConfig, resumed_at: int) -> None:
        """Append to the log of a run's folder, without the steps after `resumed_at`, which are about to be repeated.

        Raises:
            ConfigError: A tracker is not installed, or refuses to begin.
        """
        self._path = folder.metrics
        self._trackers = start_trackers(folder, config, resumed_at)
        self._drop_after(resumed_at)
        self._file = self._path.open("a")

    def write(self, metrics: Metrics) -> None:
        """Append one step's metrics; `metrics["step"]` is its number, from 1."""
        self._file.write(json.dumps({name: _json(value) for name, value in metrics.items()}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(metrics)

    def flush(self) -> None:
        """Bring the files in the run's folder up to date."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Close the file, and end what the trackers have of this launch. Once more does nothing."""
        if self._file.closed:
            return
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _drop_after(self, step: int) -> None:
        """Remove the lines of later steps, and a last line that was cut short."""
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_atomic(self._path, "".join(kept))


def start_trackers(folder: RunFolder, config: TrainConfig, resumed_at: int) -> list[Tracker]:
    """Begin or resume a run with each tracker that its config names.

    Raises:
        ConfigError: One is not installed, or refuses to begin.
    """
    log = config.log
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(TensorboardLog(folder.path, resumed_at))
    if log.wandb is not None or log.trackio is not None:
        run = TrackedRun.of(folder.path, str(folder).rstrip("/").rpartition("/")[2])
        if log.wandb is not None:
            trackers.append(WandbLog(log.wandb, run, dump(config), folder.path))
        if log.trackio is not None:
            trackers.append(TrackioLog(log.trackio, run, dump(config)))
    return trackers


def step_line(metrics: Metrics, total: int) -> str:
    """Return one step's metrics as one readable line."""
    term_names = {name.split("/")[1] for name in metrics if name.startswith("terms/")}
    parts = [f"step {metrics['step']}/{total}", f"epoch {metrics['epoch']:.2f}", f"loss {metrics['loss']:.4f}"]
    for term in sorted(term_names):
        text = f"{term} {metrics[f'terms/{term}/loss']:.3f}"
        if (accuracy := metrics.get(f"terms/{term}/accuracy")) is not None:
            text += f" acc {accuracy:.1%} scale {metrics[f'terms/{term}/scale']:.1f}"
        parts.append(text)
    if (norm := metrics["grad_norm"]) is not None:
        parts.append(f"grad {norm:.2f}")
    parts.append(f"lr {metrics['lr']:.2e}")
    parts.append(f"{metrics['images_per_s']:.0f} img/s")
    if (tflops := metrics["tflops_per_s"]) is not None:
        parts.append(f"{tflops:.3g} TFLOP/s")
    parts.append(f"{metrics['memory_gb']:.1f} GB")
    parts.append(f"data {metrics['data_wait']:.0%}")
    if left := metrics.get("seconds_left"):
        parts.append(f"{tqdm.format_interval(left)} left")
    if metrics["skipped_samples"]:
        parts.append(f"skipped samples {metrics['skipped_samples']}")
    if metrics["nonfinite_steps"]:
        parts.append(f"nonfinite steps {metrics['nonfinite_steps']}")
    return " | ".join(parts)


def _json(value: float | int | None) -> float | int | None:
    """Return null for a number that JSON does not have."""
    return value if value is None or math.isfinite(value) else None
