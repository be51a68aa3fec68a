"""What a finished run has cost."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from threetowers.trainer.monitoring.timer import Timer


@dataclass(frozen=True)
class TrainSummary:
    """Cost of a finished run over all its launches; steps that were repeated after a crash count once."""

    steps: int
    samples: int  # usable ones in the data set
    epochs: float
    seconds: float  # of training: steps, waiting for their data, warm-up
    warmup_seconds: float
    evaluation_seconds: float
    checkpoint_seconds: float
    images_per_s: float  # after warm-up
    data_wait: float  # share of the training time, after warm-up, spent waiting for data
    bottleneck: str  # a sentence
    memory_gb: float  # peak of this process since its start
    skipped_samples: int  # samples that could not be read, on this rank
    nonfinite_steps: int  # steps skipped because a loss or gradient was nonfinite
    notes: Mapping[str, int] = field(default_factory=dict)  # what was tolerated in samples, on this rank
    skipped_by_reason: Mapping[str, int] = field(default_factory=dict)  # the skipped samples, on this rank

    @classmethod
    def of(
        cls, steps: int, samples: int, epochs: float, timer: Timer, counts: Mapping[str, int], device: torch.device
    ) -> Self:
        """Return the summary of a run whose times and counts, by their names in a checkpoint, are these."""
        return cls(
            steps=steps,
            samples=samples,
            epochs=epochs,
            seconds=timer.training,
            warmup_seconds=timer.seconds("warm-up"),
            evaluation_seconds=timer.seconds("evaluation"),
            checkpoint_seconds=timer.seconds("checkpoint"),
            images_per_s=timer.images_per_s,
            data_wait=timer.data_wait,
            bottleneck=timer.bottleneck(),
            memory_gb=peak_memory(device),
            skipped_samples=counts.get("skipped_samples", 0),
            nonfinite_steps=counts.get("nonfinite_steps", 0),
            notes=_counts_below("notes/", counts),
            skipped_by_reason=_counts_below("skipped/", counts),
        )


def _counts_below(prefix: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts whose names begin so, by the rest of their names."""
    found = {name: count for name, count in counts.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): found[name] for name in sorted(found)}


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in GB: of its GPU where it has one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
