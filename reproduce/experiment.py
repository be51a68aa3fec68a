"""One experiment: a run of the trainer, evaluated; what it was, took and gave is written down when all is done."""

import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import BadPlan, Experiment, Plan
from threetowers.eval.datasets.image_set import ImageReader
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.record import EvalRecord
from threetowers.eval.suite import PlannedEvaluation, plan_evaluations, run_evaluation
from threetowers.trainer.config import TrainConfig, load
from threetowers.trainer.train import TrainSummary, train

VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS = "validation", "retrieval", "subgroups", "groups"
CHOSEN_BY = ("image_to_text/mean_reciprocal_rank", "text_to_image/mean_reciprocal_rank")


def changes_of(plan: Plan, one: Experiment, rates: dict[str, float]) -> list[str]:
    """What an experiment changes in its base config, its learning rate included."""
    rate = one.rate if one.rate is not None else rates.get(one.method)
    return plan.changes(one) + ([] if rate is None else [f"optim.lr={rate:g}"])


def is_finished(folder: Folder, one: Experiment, changes: Sequence[str]) -> bool:
    """Whether an experiment is done. Raises BadPlan where one of its name was done otherwise."""
    path = folder.finished(one.name)
    if not path.exists():
        return False
    if (found := read_json(path)["changes"]) != list(changes):
        differing = sorted(set(found) ^ set(changes))
        raise BadPlan(f"{path}: made with other settings ({differing}); remove the file, or choose another --out")
    return True


def run_of(plan: Plan, folder: Folder, configs: Path, one: Experiment, changes: Sequence[str]) -> TrainConfig:
    """The experiment as the trainer takes it."""
    where = [
        f"output_dir={folder['runs'] / one.name}",
        f"data.tars=['{folder['data/train.tar']}']",
        f"data.tokenizer={folder['data/tokenizer.model']}",
    ]
    return load(configs / plan.methods[one.method].config, [*where, *map(folder.filled, changes)])


def perform(plan: Plan, folder: Folder, configs: Path, one: Experiment, changes: Sequence[str]) -> float:
    """Train and evaluate an experiment, from where it was left; return the seconds of its training."""
    if is_finished(folder, one, changes):
        return float(read_json(folder.finished(one.name))["seconds"])
    run = run_of(plan, folder, configs, one, changes)
    summary = train(run)
    records = evaluated(plan, folder, one, Path(run.output_dir), folder.path)
    write_json(folder.finished(one.name), facts(one, changes, summary, records))
    shutil.rmtree(Path(run.output_dir) / "checkpoints")  # only resuming needs them, and there are many runs
    return summary.seconds


def facts(
    one: Experiment, changes: Sequence[str], summary: TrainSummary, records: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """What is written down of a finished experiment. `records`: file names by share of the third tower, and set."""
    return {
        "method": one.method,
        "teacher": one.teacher,
        "variant": one.variant,
        "seed": one.seed,
        "rate": one.rate,
        "changes": list(changes),
        "steps": summary.steps,
        "samples": summary.samples,
        "epochs": summary.epochs,
        "seconds": summary.seconds,
        "images_per_s": summary.images_per_s,
        "records": records,
    }


def evaluated(plan: Plan, folder: Folder, one: Experiment, run: Path, output_dir: Path) -> dict[str, dict[str, str]]:
    """Answer what is asked of an experiment, into `output_dir`; return file names by share of the third tower, and set.

    A trial sees the validation concepts only; an ablation is not probed.
    """
    sets = [VALIDATION] if one.rate is not None else [VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS]
    if one.variant is not None:
        sets.remove(GROUPS)
    planned = {name: one for name, one in _planned(folder.path).items() if name in sets}
    with tempfile.TemporaryDirectory() as embeddings:
        # Stored crops are of training pictures only: a teacher's own cache has all.
        caches = {plan.mixing.tower: folder["caches"] / one.teacher} if one.teacher else {}
        options = LoadOptions(caches, workers=0, embeddings=Path(embeddings))
        encoder = load_encoder(run, options)
        found = {"0": {n: run_evaluation(p, encoder, output_dir).file_name for n, p in planned.items()}}
        mixed = one.method == plan.mixing.method and one.variant is None and one.rate is None
        for share in plan.mixing.shares if mixed else ():
            encoder = load_encoder(run, options, EnsembleOptions(plan.mixing.tower, share, "logit"))
            wanted = {name: planned[name] for name in (VALIDATION, RETRIEVAL)}
            found[f"{share:g}"] = {n: run_evaluation(p, encoder, output_dir).file_name for n, p in wanted.items()}
    return found


def validation_score(record: EvalRecord) -> float:
    """What choices are made by: the mean reciprocal rank of validation concepts, over both directions."""
    return float(np.mean([record.metrics[name] for name in CHOSEN_BY]))


@functools.cache  # a process evaluates several runs on the same pictures
def _planned(folder: Path) -> dict[str, PlannedEvaluation]:
    reader = ImageReader()
    names = (VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS)
    return {name: one for name in names for one in plan_evaluations(folder / "sets" / f"{name}.yaml", reader=reader)}
