"""What a report says of a model beside its results: how it was trained and what that cost. Kept with the records."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from threetowers.cache.schema import parse_as
from threetowers.cache.storage.atomic import write_atomic
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.record import BadRecord
from threetowers.eval.report.cache_costs import CacheFacts, caches_of
from threetowers.eval.report.training_curves import TrainingMetrics, read_metrics, thinned
from threetowers.trainer.config import CacheTower, load
from threetowers.trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Card:
    """A model. `stage_seconds`: wall time of building its caches and of training; `curves`: its training, thinned."""

    name: str
    digest: str
    method: str
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    caches: tuple[CacheFacts, ...] = ()
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    unreadable: int = 0  # lines of the metrics that could not be read

    def metrics(self) -> TrainingMetrics | None:
        """The curves to draw; None for a model without any."""
        return TrainingMetrics.of(self.curves, self.unreadable) if self.curves or self.unreadable else None


def card_of(spec: str | Path, encoder: Encoder) -> Card:
    """The card of a model just loaded by `spec`; a run's folder tells more than another model."""
    folder = RunFolder(Path(spec))
    facts = encoder.facts
    if not folder.config.exists():
        return Card(facts.name, facts.digest, str(spec).partition(":")[0])
    run = load(folder.config)
    caches = tuple(caches_of(run))
    stages = {"cache": sum(cache.seconds for cache in caches)} if caches else {}
    if folder.summary.exists():
        stages["training"] = float(json.loads(folder.summary.read_text())["seconds"])
    metrics = read_metrics(folder.metrics) if folder.metrics.exists() else None
    locked = isinstance(run.towers[run.root_of(run.deploy.image)], CacheTower)
    return Card(
        name=facts.name,
        digest=facts.digest,
        method=" + ".join(run.terms) + (" on cached rows" if locked else ""),
        stage_seconds=stages,
        caches=caches,
        curves=thinned(metrics) if metrics else {},
        unreadable=metrics.unreadable if metrics else 0,
    )


def write_card(card: Card, folder: Path) -> None:
    """Keep a card; one of the same model is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", card.name)[:80]
    write_atomic(folder / f"{name}-{card.digest[:16]}.json", json.dumps(asdict(card), default=str))


def read_cards(folder: Path) -> dict[tuple[str, str], Card]:
    """The cards of a folder by name and digest. Raises BadRecord for a file that is none."""
    cards = [_read(path) for path in sorted(folder.glob("*.json"))]
    return {(card.name, card.digest): card for card in cards}


def _read(path: Path) -> Card:
    return parse_as(Card, path.read_bytes(), BadRecord, f"{path} is not the metadata of a model", "evaluate again")
