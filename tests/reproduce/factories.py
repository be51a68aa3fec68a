"""Made-up results of finished experiments: records with items whose differences are known."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from reproduce.experiment import GROUPS, RETRIEVAL, SUBGROUPS, VALIDATION
from reproduce.folder import Folder, write_json
from reproduce.plan import Experiment
from threetowers.eval.encoders.encoder import ModelInfo
from threetowers.eval.record import EvalRecord, EvalSpec, write_record

CONCEPTS = 400
DIRECTIONS = ("image_to_text", "text_to_image")


def finish(folder: Folder, experiment: Experiment, quality: float, shares: Sequence[tuple[str, float]] = ()) -> None:
    """Write a finished experiment whose items are right with chance `quality`; `shares` gives that of each share."""
    records: dict[str, dict[str, str]] = {}
    for share, share_quality in (("0", quality), *shares):
        records[share] = {}
        for name in (VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS):
            records[share][name] = _write_record(folder, experiment, share, name, share_quality)
    costs = {"steps": 10, "samples": 100, "epochs": 1.0, "seconds": 2.0, "images_per_s": 50.0}
    content = asdict(experiment) | {"changes": ["optim.lr=0.001"], **costs, "records": records}
    write_json(folder.finished(experiment.name), content)


def _write_record(folder: Folder, experiment: Experiment, share: str, name: str, quality: float) -> str:
    task, gallery, metrics = {
        VALIDATION: ("retrieval", "validation-retrieval", [f"{d}/mean_reciprocal_rank" for d in DIRECTIONS]),
        RETRIEVAL: (
            "shift",
            "heldout-retrieval",
            [
                f"{part}/{d}/{metric}"
                for metric in ("recall@1", "mean_reciprocal_rank")
                for part in ("original", "unseen-style")
                for d in DIRECTIONS
            ],
        ),
        SUBGROUPS: ("shift", "heldout-subgroups", ["original/top1", "unseen-style/top1"]),
        GROUPS: ("fewshot", "heldout-groups", ["10-shot/top1"]),
    }[name]
    # The same draws for every model: they differ in the threshold, as models differ on the same concepts.
    hard = {metric: np.random.default_rng(number).random(CONCEPTS) for number, metric in enumerate(metrics)}
    items = {metric: (x < quality).astype(np.float32) for metric, x in hard.items()}
    facts = ModelInfo(
        f"made-up-{experiment.name}-{share}",
        "0" * 64,
        10,
        "float32",
        "made up by a test",
        "0" * 32,
        seed=experiment.seed,
    )
    record = EvalRecord(
        spec=EvalSpec.of(task, gallery, facts, [], {}),
        metrics={metric: float(values.mean()) for metric, values in items.items()},
        counts={},
        sample_ids="",
        texts="",
        seconds=0.1,
        items=tuple(items),
    )
    return write_record(record, folder["records"], items).name
