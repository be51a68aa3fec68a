"""One experiment: a run is trained and evaluated, then its settings, costs and records are written to one file."""

import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import TERM_TEACHER, THIRD_TOWER, BadPlan, Experiment, Plan
from threetowers.eval.datasets.image_set import ImageReader
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.record import EvalRecord
from threetowers.eval.suite import PlannedEvaluation, plan_evaluations, run_evaluation
from threetowers.trainer.config import TrainConfig, load_config
from threetowers.trainer.monitoring.train_summary import TrainSummary
from threetowers.trainer.train import train

VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS = "validation", "retrieval", "subgroups", "groups"
VALIDATION_METRICS = ("image_to_text/mean_reciprocal_rank", "text_to_image/mean_reciprocal_rank")


def all_changes(
    plan: Plan, experiment: Experiment, rates: Mapping[str, float], temperatures: Mapping[str, float]
) -> list[str]:
    """Return the changes of an experiment to its base config, with what was found out by other experiments.

    Args:
        plan: The plan.
        experiment: One of its experiments.
        rates: Chosen learning rates by method.
        temperatures: Learned temperatures of the runs that teach, by their names.
    """
    rate = experiment.rate if experiment.rate is not None else rates.get(experiment.method)
    changes = plan.changes(experiment)
    if rate is not None:
        changes.append(f"optim.lr={rate:g}")
    temperature = temperatures.get(experiment.teacher or "") if plan.is_taught(experiment) else None
    if temperature is not None:
        changes.append(f"{TERM_TEACHER}.temperature={temperature:.4g}")
    return changes


def is_finished(folder: Folder, experiment: Experiment, changes: Sequence[str]) -> bool:
    """Return whether an experiment is finished.

    Raises:
        BadPlan: If one of its name was run with other changes.
    """
    path = folder.finished(experiment.name)
    if not path.exists():
        return False
    if (found := read_json(path)["changes"]) != list(changes):
        differing = sorted(set(found) ^ set(changes))
        raise BadPlan(
            f"{path}: run with other settings ({differing}); remove the file to run it again, or choose another --out"
        )
    return True


def train_config(
    plan: Plan, folder: Folder, configs: Path, experiment: Experiment, changes: Sequence[str]
) -> TrainConfig:
    """Return the config of an experiment for the trainer."""
    paths = [
        f"output_dir={folder['runs'] / experiment.name}",
        f"data.tars=['{folder['data/train.tar']}']",
        f"data.tokenizer={folder['data/tokenizer.model']}",
    ]
    return load_config(configs / plan.methods[experiment.method].config, [*paths, *map(folder.substitute, changes)])


def run_experiment(plan: Plan, folder: Folder, configs: Path, experiment: Experiment, changes: Sequence[str]) -> float:
    """Train and evaluate an experiment, resuming it if it was interrupted; return the seconds of its training."""
    if is_finished(folder, experiment, changes):
        return float(read_json(folder.finished(experiment.name))["seconds"])
    config = train_config(plan, folder, configs, experiment, changes)
    summary = train(config)
    records = evaluate_experiment(plan, folder, experiment, Path(config.output_dir), folder.path)
    write_json(folder.finished(experiment.name), _finished_entry(experiment, changes, summary, records))
    shutil.rmtree(Path(config.output_dir) / "checkpoints")  # only resuming needs them, and there are many runs
    return summary.seconds


def _finished_entry(
    experiment: Experiment, changes: Sequence[str], summary: TrainSummary, records: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Return the content of the file of a finished experiment; `records` as `evaluate_experiment` returns them."""
    return {
        "method": experiment.method,
        "teacher": experiment.teacher,
        "variant": experiment.variant,
        "seed": experiment.seed,
        "rate": experiment.rate,
        "changes": list(changes),
        "steps": summary.steps,
        "samples": summary.samples,
        "epochs": summary.epochs,
        "seconds": summary.seconds,
        "images_per_s": summary.images_per_s,
        "records": records,
    }


def evaluate_experiment(
    plan: Plan, folder: Folder, experiment: Experiment, run: Path, output_dir: Path
) -> dict[str, dict[str, str]]:
    """Evaluate the run of an experiment into `output_dir`; return file names by share of the third tower and by set.

    A trial of the sweep sees the validation concepts only; an ablation is not probed.
    """
    sets = [VALIDATION] if experiment.rate is not None else [VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS]
    if experiment.variant is not None:
        sets.remove(GROUPS)

    def evaluate(encoder: Encoder, names: Sequence[str]) -> dict[str, str]:
        planned = _planned(folder.path)
        return {name: run_evaluation(planned[name], encoder, output_dir).file_name for name in names}

    with tempfile.TemporaryDirectory() as embeddings:
        # Caches of crops have the training images only, a teacher's own cache all images.
        has_third = experiment.teacher is not None and not plan.is_taught(experiment)
        caches = {THIRD_TOWER: folder[f"caches/{experiment.teacher}"]} if has_third else {}
        options = LoadOptions(caches, workers=0, embeddings=Path(embeddings))
        files = {"0": evaluate(load_encoder(run, options), sets)}
        in_grid = experiment.variant is None and experiment.rate is None
        if in_grid and plan.mixing is not None and experiment.method == plan.mixing.method:
            for share in plan.mixing.shares:
                encoder = load_encoder(run, options, EnsembleOptions(THIRD_TOWER, share, "logit"))
                files[f"{share:g}"] = evaluate(encoder, [VALIDATION, RETRIEVAL])
    return files


def validation_score(record: EvalRecord) -> float:
    """Return the score that choices are made by: the mean over both directions of the mean reciprocal rank."""
    return float(np.mean([record.metrics[name] for name in VALIDATION_METRICS]))


@functools.cache  # a process evaluates several runs on the same images
def _planned(folder: Path) -> dict[str, PlannedEvaluation]:
    """Return the task of each evaluation set."""
    reader = ImageReader()
    planned = {}
    for name in (VALIDATION, RETRIEVAL, SUBGROUPS, GROUPS):
        (planned[name],) = plan_evaluations(folder / "sets" / f"{name}.yaml", reader=reader).evaluations
    return planned
