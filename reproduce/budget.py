"""What a plan will take, before it is begun: runs times seconds, from one short measured run a method."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reproduce.experiment import evaluated, run_of
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import Experiment, Plan
from reproduce.pool import Task, perform_all
from reproduce.pretraining import pretrain
from reproduce.teachers import backbone, cache_teacher, seconds_of, tars_of
from threetowers.cache.builder.build import build
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig
from threetowers.cache.estimate import estimate as plan_cache
from threetowers.trainer.train import train

STEPS = 12
SAMPLE = 32  # pictures that a large teacher is timed on
OWN = "measured-"  # in front of the name of a teacher that is hardly pretrained, only to see how long it takes
SEED = 1_000_000  # of measured runs: no plan has it, so that the folder is theirs alone


@dataclass(frozen=True)
class Pace:
    """Seconds on one core that a method takes for an epoch, and to be evaluated."""

    epoch: float
    evaluation: float


@dataclass(frozen=True)
class TeacherPace:
    """Seconds on one core that a teacher's cache takes, and its pretraining where it is made here."""

    cache: float
    pretraining: float = 0.0


@dataclass(frozen=True)
class Line:
    """So many pieces of work of so many seconds, on one core each."""

    what: str
    count: int
    seconds: float

    @property
    def total(self) -> float:
        return self.count * self.seconds


def measure(plan: Plan, folder: Folder, configs: Path, workers: int) -> None:
    """Leave in the folder the seconds of what a plan is made of, where they are not there yet.

    Measured as it will be run, side by side: cores share caches and memory, so that each is slower than alone. In
    other processes: a trainer leaves the address of its process group in the environment, for all who come after.
    """
    own = [name for name, teacher in plan.teachers.items() if teacher.pretrain]
    teachers = [Task(name, measure_own_teacher, (name, plan, folder)) for name in own]  # first: runs read their caches
    others = [Task(name, measure_teacher, (name, plan, folder)) for name in plan.teachers if name not in own]
    kinds = dict.fromkeys(kind_of(plan, one) for one in plan.experiments())
    others += [Task(name, measure_run, (name, plan, folder, configs)) for name in kinds]
    for tasks in (teachers, others):
        perform_all([task for task in tasks if not _path(folder, task.name).exists()], workers, "measurement")


def kind_of(plan: Plan, one: Experiment) -> str:
    """What is timed for an experiment: its method, or METHOD-VARIANT where a teacher of another size comes with it.

    Other ablations are taken to be as fast as their method.
    """
    own = one.variant is not None and plan.ablations.variants[one.variant].teacher
    return f"{one.method}-{one.variant}" if own else one.method


def lines(plan: Plan, folder: Folder, configs: Path) -> list[Line]:
    """The work of a plan, by what was measured."""
    teachers = {name: TeacherPace(**read_json(_path(folder, name))) for name in plan.teachers}
    kinds = {kind_of(plan, one) for one in plan.experiments()}
    paces = {name: Pace(**read_json(_path(folder, name))) for name in kinds}
    return list(work(plan, folder, configs, teachers, paces))


def work(
    plan: Plan, folder: Folder, configs: Path, teachers: Mapping[str, TeacherPace], paces: Mapping[str, Pace]
) -> Iterator[Line]:
    """The arithmetic: each kind of work, how often, and its seconds. `paces`: by kind of run."""
    for name, teacher in plan.teachers.items():
        if teacher.pretrain:
            yield Line(f"pretraining of {name}", 1, teachers[name].pretraining)
        yield Line(f"cache of {name}", 1, teachers[name].cache)
    for name, view in plan.views.items():
        yield Line(f"cache of {name}", 1, teachers[view.teacher].cache)
    for what, experiments in (("trials", plan.trials()), ("runs", plan.experiments())):
        for kind in dict.fromkeys(kind_of(plan, one) for one in experiments):
            mine = [one for one in experiments if kind_of(plan, one) == kind]
            epochs = [run_of(plan, folder, configs, one, plan.changes(one)).duration.epochs or 0.0 for one in mine]
            each = sum(epochs) / len(mine) * paces[kind].epoch
            yield Line(f"{what} of {kind}", len(mine), each + paces[kind].evaluation)


def table(lines: Sequence[Line], workers: int, minutes: float) -> str:
    """The arithmetic, for a terminal."""
    width = max(len(line.what) for line in lines)
    rows = [
        f"{line.what:<{width}}  {line.count:>4} x {line.seconds:>6.1f} s = {line.total / 60:>6.1f} min"
        for line in lines
    ]
    cores = max(1, workers)
    total = sum(line.total for line in lines) / 60
    rows.append(f"{total:.0f} core minutes, {total / cores:.0f} min on {cores} cores; the budget is {minutes:g} min")
    if total / cores > minutes:
        rows.append("that is more than the budget: lower epochs or seeds in the plan, or take the time")
    return "\n".join(rows)


def measure_own_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Time a few steps of pretraining a teacher here, and its cache."""
    how, kind = plan.pretraining_of(name), plan.teachers[name].pretrain
    assert kind is not None
    made, cache = folder[f"teachers/{OWN}{name}"], folder[f"caches/{OWN}{name}"]
    pretrain(kind, replace(how, steps=STEPS), folder, made)
    build(
        BuildConfig(
            tars=tars_of(plan, folder), output_dir=cache, backbone=str(made), image_size=how.image_size, threads=1
        )
    )
    per_step = read_json(made / "pretraining.json").get("seconds_per_step", 0.0)
    write_json(_path(folder, name), asdict(TeacherPace(seconds_of(cache, "*"), per_step * how.steps)))


def measure_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Time the teacher of a package on a few pictures."""
    config = EmbeddingConfig(tars=tars_of(plan, folder), threads=1, **backbone(name, plan, folder))
    cost = plan_cache(config, sample=SAMPLE)
    write_json(_path(folder, name), asdict(TeacherPace(3600 * cost.hours)))


def measure_run(kind: str, plan: Plan, folder: Folder, configs: Path) -> None:
    """Time a few steps of a kind of run, and its evaluation; with a teacher that was made to be timed."""
    one = next(one for one in plan.experiments() if kind_of(plan, one) == kind)
    teacher, own = one.teacher, [name for name, teacher in plan.teachers.items() if teacher.pretrain]
    if teacher is not None and own:
        one = replace(one, teacher=OWN + (teacher if teacher in own else own[0]))
    elif teacher is not None:
        cache_teacher(teacher, plan, folder)
    one = replace(one, seed=SEED)
    run = run_of(plan, folder, configs, one, [*plan.changes(one), f"duration={{steps: {STEPS}}}"])
    summary = train(run)
    started = time.perf_counter()
    evaluated(plan, folder, one, Path(run.output_dir), Path(run.output_dir) / "records")
    evaluation = time.perf_counter() - started
    shutil.rmtree(run.output_dir)
    write_json(_path(folder, kind), asdict(Pace(summary.samples / summary.images_per_s, evaluation)))


def _path(folder: Folder, name: str) -> Path:
    return folder[f"budget/{name}.json"]
