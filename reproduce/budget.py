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
from reproduce.teachers import cache_seconds, cache_teacher, encoder_name, tars_of
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig
from threetowers.cache.estimate.estimate import estimate
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
    alone. They run in other processes: a trainer leaves the address of its process group in the environment.
    """
    pretrained = []
    others = []
    for name, teacher in plan.teachers.items():
        if teacher.pretrain:
            pretrained.append(Task(name, measure_pretrained_teacher, (name, plan, folder)))
        else:
            others.append(Task(name, measure_packaged_teacher, (name, plan, folder)))
    for kind in _kinds(plan):
        others.append(Task(kind, measure_run, (kind, plan, folder, configs)))
    for tasks in (pretrained, others):  # in this order: the measured runs read the caches of pretrained teachers
        run_tasks([task for task in tasks if not _path(folder, task.name).exists()], workers, "measurement")


def kind_of(plan: Plan, experiment: Experiment) -> str:
    """Return the kind of run that is timed for an experiment: METHOD, or METHOD-VARIANT for one with its own teacher.

    Other ablations are taken to be as fast as their method.
    """
    if experiment.variant is not None and plan.ablations.variants[experiment.variant].teacher:
        return f"{experiment.method}-{experiment.variant}"
    return experiment.method


def _kinds(plan: Plan) -> list[str]:
    return list(dict.fromkeys(kind_of(plan, experiment) for experiment in plan.experiments()))


def estimate_budget(plan: Plan, folder: Folder, configs: Path) -> list[BudgetLine]:
    """Return the work of a plan with the measured seconds of its folder."""
    teachers = {name: TeacherSeconds(**read_json(_path(folder, name))) for name in plan.teachers}
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
    experiment = next(experiment for experiment in plan.experiments() if kind_of(plan, experiment) == kind)
    pretrained = [name for name, source in plan.teachers.items() if source.pretrain]
    teacher = experiment.teacher
    if teacher is not None and pretrained:
        teacher = MEASURED + (teacher if teacher in pretrained else pretrained[0])
    elif teacher is not None:
        cache_teacher(teacher, plan, folder)
    experiment = replace(experiment, teacher=teacher, seed=SEED)
    changes = [*plan.changes(experiment), f"duration={{steps: {STEPS}}}"]
    config = train_config(plan, folder, configs, experiment, changes)
    run = Path(config.output_dir)
    summary = train(config)
    started = time.perf_counter()
    evaluate_experiment(plan, folder, experiment, run, run)
    evaluation = time.perf_counter() - started
    shutil.rmtree(run)
    write_json(_path(folder, kind), asdict(RunSeconds(summary.samples / summary.images_per_s, evaluation)))


def _path(folder: Folder, name: str) -> Path:
    return folder[f"budget/{name}.json"]
