"""Estimate of the time of a plan: numbers of runs times seconds, from one short measured run a method."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reproduce.experiment import evaluate_experiment, train_config
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import Experiment, Plan
from reproduce.pool import Task, run_tasks
from reproduce.pretraining import pretrain
from reproduce.run_teachers import SIDES, embed_run
from reproduce.teachers import cache_seconds, cache_teacher, encoder_name, tars_of
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig
from threetowers.cache.estimate.estimate import estimate
from threetowers.trainer.monitoring.train_summary import TrainSummary
from threetowers.trainer.train import train

STEPS = 12
SAMPLE = 32  # images that a large teacher is timed on
MEASURED = "measured-"  # prefix of the name of a teacher that is pretrained for a few steps, to be timed
SEED = 1_000_000  # of measured runs: no plan has it, so that they share no run folder


@dataclass(frozen=True)
class RunSeconds:
    """Seconds on one core of an epoch of a method, and of its evaluation."""

    epoch: float
    evaluation: float


@dataclass(frozen=True)
class TeacherSeconds:
    """Seconds on one core of the cache of a teacher, and of its pretraining if it is pretrained here."""

    cache: float
    pretraining: float = 0.0


@dataclass(frozen=True)
class BudgetLine:
    """Some pieces of work of equal seconds, each on one core."""

    what: str
    count: int
    seconds: float

    @property
    def total(self) -> float:
        """Seconds of all of them."""
        return self.count * self.seconds


def measure_work(plan: Plan, folder: Folder, configs: Path, workers: int) -> None:
    """Measure the seconds of each kind of work of a plan that has not been measured yet, and write them.

    The measurements run side by side, as the work will: cores share caches and memory, so that each is slower than
    alone. They run in other processes, since a process that has trained keeps its process group.
    """
    pretrained = []
    others = []
    teaching = [Task(name, measure_teacher_run, (name, plan, folder, configs)) for name in plan.teacher_runs]
    taught: list[Task] = []
    for name, teacher in plan.teachers.items():
        if teacher.pretrain:
            pretrained.append(Task(name, measure_pretrained_teacher, (name, plan, folder)))
        else:
            others.append(Task(name, measure_packaged_teacher, (name, plan, folder)))
    for kind, experiment in _kinds(plan).items():
        runs = taught if plan.is_taught(experiment) else others
        runs.append(Task(kind, measure_run, (kind, plan, folder, configs)))
    # Without a pretrained teacher, whose measured cache stands in, or where methods name its cache, it is built now.
    named = " ".join(change for method in plan.methods.values() for change in method.set)
    if any(not _path(folder, task.name).exists() for task in (*others, *teaching, *taught)):
        read = [name for name in plan.teachers if not pretrained or f"$caches/{name}" in named]
        new = [name for name in read if not folder[f"fits/{name}.json"].exists()]
        run_tasks([Task(name, cache_teacher, (name, plan, folder)) for name in new], workers, "teacher")
    for tasks in (pretrained, others, teaching, taught):  # in this order: each reads caches of those before it
        run_tasks([task for task in tasks if not _path(folder, task.name).exists()], workers, "measurement")


def kind_of(plan: Plan, experiment: Experiment) -> str:
    """Return the kind of run that is timed for an experiment.

    It is METHOD, or METHOD-VARIANT for one with its own teacher or that teaches. Other ablations are taken to be as
    fast as their method.
    """
    if experiment.variant is None:
        return experiment.method
    own_teacher = plan.ablations.variants[experiment.variant].teacher is not None
    teaches = experiment.variant in {run.variant for run in plan.teacher_runs.values()}
    return f"{experiment.method}-{experiment.variant}" if own_teacher or teaches else experiment.method


def _kinds(plan: Plan) -> dict[str, Experiment]:
    """Return the kinds of run, each with the first of its experiments."""
    kinds: dict[str, Experiment] = {}
    for experiment in plan.experiments():
        kinds.setdefault(kind_of(plan, experiment), experiment)
    return kinds


def estimate_budget(plan: Plan, folder: Folder, configs: Path) -> list[BudgetLine]:
    """Return the work of a plan with the measured seconds of its folder."""
    names = (*plan.teachers, *plan.teacher_runs)
    teachers = {name: TeacherSeconds(**read_json(_path(folder, name))) for name in names}
    runs = {kind: RunSeconds(**read_json(_path(folder, kind))) for kind in _kinds(plan)}
    return list(budget_lines(plan, folder, configs, teachers, runs))


def budget_lines(
    plan: Plan, folder: Folder, configs: Path, teachers: Mapping[str, TeacherSeconds], runs: Mapping[str, RunSeconds]
) -> Iterator[BudgetLine]:
    """Yield each kind of work with its number and seconds; `runs` are by kind of run."""
    for name, teacher in plan.teachers.items():
        if teacher.pretrain:
            yield BudgetLine(f"pretraining of {name}", 1, teachers[name].pretraining)
        yield BudgetLine(f"cache of {name}", 1, teachers[name].cache)
    for name, view in plan.views.items():
        yield BudgetLine(f"cache of {name}", 1, teachers[view.teacher].cache)
    for name in plan.teacher_runs:
        yield BudgetLine(f"caches of {name}", 1, teachers[name].cache)
    for what, experiments in (("trials", plan.trials()), ("runs", plan.experiments())):
        epochs: dict[str, list[float]] = {}
        for experiment in experiments:
            config = train_config(plan, folder, configs, experiment, plan.changes(experiment))
            epochs.setdefault(kind_of(plan, experiment), []).append(config.duration.epochs or 0.0)
        for kind, kind_epochs in epochs.items():
            training = sum(kind_epochs) / len(kind_epochs) * runs[kind].epoch
            yield BudgetLine(f"{what} of {kind}", len(kind_epochs), training + runs[kind].evaluation)


def budget_table(lines: Sequence[BudgetLine], workers: int, minutes: float) -> str:
    """Return the estimate for a terminal, beside the budget in minutes."""
    width = max(len(line.what) for line in lines)
    rows = [
        f"{line.what:<{width}}  {line.count:>4} x {line.seconds:>6.1f} s = {line.total / 60:>6.1f} min"
        for line in lines
    ]
    cores = max(1, workers)
    total = sum(line.total for line in lines) / 60
    rows.append(f"{total:.0f} core minutes, {total / cores:.0f} min on {cores} cores; the budget is {minutes:g} min")
    if total / cores > minutes:
        rows.append("that is more than the budget: lower `epochs` or `seeds` of the plan, or accept the time")
    return "\n".join(rows)


def measure_pretrained_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Time a few steps of pretraining a teacher, and the building of its cache."""
    how = plan.pretraining_of(name)
    kind = plan.teachers[name].pretrain
    assert kind is not None
    teacher = folder[f"teachers/{MEASURED}{name}"]
    cache = folder[f"caches/{MEASURED}{name}"]
    pretrain(kind, replace(how, steps=STEPS), folder, teacher)
    tars = tars_of(plan, folder)
    build_cache(BuildConfig(tars=tars, output_dir=cache, encoder=f"timm:{teacher}@{how.image_size}", threads=1))
    per_step = read_json(teacher / "pretraining.json").get("seconds_per_step", 0.0)
    write_json(_path(folder, name), asdict(TeacherSeconds(cache_seconds(cache, "*"), per_step * how.steps)))


def measure_packaged_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Time the teacher of a package on a few images."""
    config = EmbeddingConfig(tars=tars_of(plan, folder), threads=1, encoder=encoder_name(name, plan, folder))
    cost = estimate(config, sample=SAMPLE)
    write_json(_path(folder, name), asdict(TeacherSeconds(3600 * cost.hours)))


def measure_run(kind: str, plan: Plan, folder: Folder, configs: Path) -> None:
    """Time a few steps of a kind of run, and its evaluation, by the cache of a measured teacher if there is one."""
    experiment = _kinds(plan)[kind]
    pretrained = [name for name, source in plan.teachers.items() if source.pretrain]
    teacher = experiment.teacher
    if plan.is_taught(experiment):
        teacher = f"{MEASURED}{teacher}"
    elif teacher is not None and pretrained:
        teacher = MEASURED + (teacher if teacher in pretrained else pretrained[0])
    summary, run, experiment = _short_run(plan, folder, configs, replace(experiment, teacher=teacher))
    started = time.perf_counter()
    evaluate_experiment(plan, folder, experiment, run, run)
    evaluation = time.perf_counter() - started
    shutil.rmtree(run)
    write_json(_path(folder, kind), asdict(RunSeconds(summary.samples / summary.images_per_s, evaluation)))


def measure_teacher_run(name: str, plan: Plan, folder: Folder, configs: Path) -> None:
    """Train a run that teaches for a few steps, and time its caches, which the measured runs that it teaches read."""
    _, run, experiment = _short_run(plan, folder, configs, plan.teaching_experiment(name))
    measured = MEASURED + name
    embed_run(measured, run, experiment.teacher, folder)
    shutil.rmtree(run)
    seconds = sum(cache_seconds(folder[f"caches/{measured}-{side}"]) for side in SIDES)
    write_json(_path(folder, name), asdict(TeacherSeconds(seconds)))


def _short_run(
    plan: Plan, folder: Folder, configs: Path, experiment: Experiment
) -> tuple[TrainSummary, Path, Experiment]:
    """Train an experiment for a few steps; return its costs, its folder, and itself with a seed of its own."""
    experiment = replace(experiment, seed=SEED)
    changes = [*plan.changes(experiment), f"duration={{steps: {STEPS}}}"]
    config = train_config(plan, folder, configs, experiment, changes)
    return train(config), Path(config.output_dir), experiment


def _path(folder: Folder, name: str) -> Path:
    return folder[f"budget/{name}.json"]
