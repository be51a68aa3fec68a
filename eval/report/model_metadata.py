"""How a model was trained and what that cost, as a report tells it; kept beside the records."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from threetowers.cache.schema import parse_as
from threetowers.cache.storage.atomic import write_atomic
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.record import BadRecord
from threetowers.eval.report.cache_costs import CacheCost, cache_costs
from threetowers.eval.report.training_curves import TrainingMetrics, read_metrics, thinned
from threetowers.trainer.config import CacheTower, load_config
from threetowers.trainer.run.finished_run import finished_run_folder


@dataclass(frozen=True)
class ModelMetadata:
    """How a model was trained and what that cost.

    Attributes:
        name: Name in records and tables.
        digest: Digest of its weights.
        method: The loss terms of a run, with the sides that it deploys on cached towers; or the kind of another model.
        stage_seconds: Wall seconds of building its caches and of training.
        caches: The caches it was trained with.
        curves: Steps and values of its training metrics, thinned.
        unreadable: Lines of the metrics that could not be read.
    """

    name: str
    digest: str
    method: str
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    caches: tuple[CacheCost, ...] = ()
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    unreadable: int = 0

    def metrics(self) -> TrainingMetrics | None:
        """Return the training curves; None for a model without any."""
        return TrainingMetrics.of(self.curves, self.unreadable) if self.curves or self.unreadable else None


def model_metadata(model: str | Path, encoder: Encoder) -> ModelMetadata:
    """Return the metadata of a model that was loaded by the name `model`; there is more of a run than of others."""
    folder = finished_run_folder(model)
    info = encoder.info
    if not folder.config.exists():
        return ModelMetadata(info.name, info.digest, str(model).partition(":")[0])
    run = load_config(folder.config)
    caches = tuple(cache_costs(run))
    stages = {"cache": sum(cache.seconds for cache in caches)} if caches else {}
    if folder.summary.exists():
        stages["training"] = float(json.loads(folder.summary.read_text())["seconds"])
    metrics = read_metrics(folder.metrics) if folder.metrics.exists() else None
    deployed = {"image": run.deploy.image, "text": run.deploy.text}
    cached = [side for side, head in deployed.items() if isinstance(run.towers[run.root_of(head)], CacheTower)]
    return ModelMetadata(
        name=info.name,
        digest=info.digest,
        method=" + ".join(run.terms) + (f" (cached: {', '.join(cached)})" if cached else ""),
        stage_seconds=stages,
        caches=caches,
        curves=thinned(metrics) if metrics else {},
        unreadable=metrics.unreadable if metrics else 0,
    )


def write_model_metadata(metadata: ModelMetadata, folder: Path) -> None:
    """Write metadata into a folder; a file of the same model is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", metadata.name)[:80]
    write_atomic(folder / f"{name}-{metadata.digest[:16]}.json", json.dumps(asdict(metadata), default=str))


def read_model_metadata(folder: Path) -> dict[tuple[str, str], ModelMetadata]:
    """Return the metadata of all models of a folder, by name and digest. Raises BadRecord for another file."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        headline = f"{path} is not the metadata of a model"
        metadata = parse_as(ModelMetadata, path.read_bytes(), BadRecord, headline, "evaluate again")
        found[metadata.name, metadata.digest] = metadata
    return found
