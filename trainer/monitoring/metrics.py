"""Metrics of a run: a readable line, a JSON line and tensorboard scalars per logged step."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from threetowers.cache.storage.atomic import write_atomic

logger = logging.getLogger(__name__)

Metrics = dict[str, float | int | None]


class MetricsLog:
    """Writes `metrics.jsonl` and, if asked, tensorboard events. For the first rank only."""

    def __init__(self, folder: Path, resumed_at: int, tensorboard: bool) -> None:
        """Append to the log of a run's folder, without the steps after `resumed_at`, which are about to be repeated."""
        self._path = folder / "metrics.jsonl"
        self._drop_after(resumed_at)
        self._file = self._path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, metrics: Metrics) -> None:
        """Append one step's metrics; `metrics["step"]` is its number, from 1."""
        self._file.write(json.dumps({name: _json(value) for name, value in metrics.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _drop_after(self, step: int) -> None:
        """Remove the lines of later steps, and a last line that was cut short."""
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_atomic(self._path, "".join(kept))


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
