"""Results made up by tests: records with items whose differences are known, as finished experiments leave them."""

from collections.abc import Sequence

import numpy as np

from reproduce.experiment import GROUPS, RETRIEVAL, SUBGROUPS, VALIDATION
from reproduce.folder import Folder, write_json
from reproduce.plan import Experiment
from threetowers.eval.encoders.encoder import ModelInfo
from threetowers.eval.record import EvalRecord, EvalSpec, write_record

CONCEPTS = 400
DIRECTIONS = ("image_to_text", "text_to_image")


def finish(folder: Folder, one: Experiment, quality: float, shares: Sequence[tuple[str, float]] = ()) -> None:
    """Leave a finished experiment whose items are right with chance `quality`; with `shares` mixed in, theirs."""
    records = {
        share: {name: _record(folder, one, share, name, right) for name in (VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS)}
        for share, right in (("0", quality), *shares)
    }
    facts = {"method": one.method, "teacher": one.teacher, "variant": one.variant, "seed": one.seed, "rate": one.rate}
    took = {"steps": 10, "samples": 100, "epochs": 1.0, "seconds": 2.0, "images_per_s": 50.0}
    write_json(folder.finished(one.name), facts | {"changes": ["optim.lr=0.001"], **took, "records": records})


def _record(folder: Folder, one: Experiment, share: str, name: str, quality: float) -> str:
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
    facts = ModelInfo(f"made-up-{one.name}-{share}", "0" * 64, 10, "float32", "made up by a test", seed=one.seed)
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
