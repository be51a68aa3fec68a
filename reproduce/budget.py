"""What a plan will take, before it is begun: runs times seconds, from one short measured run a method."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reproduce.experiment import evaluated, run_of
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import Experiment, Plan
from reproduce.pool import Task, perform_all
from reproduce.pretraining import pretrain
from reproduce.teachers import backbone, seconds_of, tars_of
from threetowers.cache.build import build
from threetowers.cache.plan import plan as plan_cache
from threetowers.trainer.loop import train

STEPS = 12
SAMPLE = 32  # pictures that a large teacher is timed on
OWN = "measured"  # stands for the teachers of the equal arm
SEED = 1_000_000  # of measured runs: no plan has it, so that the folder is theirs alone


@dataclass(frozen=True)
class Pace:
    """Seconds on one core that a method takes for an epoch, and to be evaluated."""

    epoch: float
    evaluation: float


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
    methods = dict.fromkeys(one.method for one in plan.experiments())
    large = [name for name, teacher in plan.teachers.items() if teacher.arm == "large"]
    own = Task(OWN, measure_own_teacher, (plan, folder))  # first: methods read its cache
    others = [Task(name, measure_method, (name, plan, folder, configs)) for name in methods]
    others += [Task(name, measure_large_teacher, (name, plan, folder)) for name in large]
    for tasks in ([own], others):
        perform_all([task for task in tasks if not _path(folder, task.name).exists()], workers, "measurement")


def lines(plan: Plan, folder: Folder, configs: Path) -> list[Line]:
    """The work of a plan, by what was measured.

    Ablations are taken to be as fast as their method, and pretraining, a run or two, is left out.
    """
    found = {path.stem: read_json(path) for path in folder["budget"].iterdir()}
    paces = {name: Pace(**facts) for name, facts in found.items() if name in plan.methods}
    caches = {name: facts["seconds"] for name, facts in found.items() if name not in plan.methods}
    return list(work(plan, folder, configs, caches, paces))


def work(
    plan: Plan, folder: Folder, configs: Path, caches: Mapping[str, float], paces: Mapping[str, Pace]
) -> Iterator[Line]:
    """The arithmetic: each kind of work, how often, and its seconds. `caches`: seconds by large teacher, or our own."""
    for name, teacher in plan.teachers.items():
        yield Line(f"cache of {name}", 1, caches[OWN if teacher.arm == "equal" else name])
    if plan.views:
        yield Line("caches of further views", len(plan.views), caches[OWN])
    for what, experiments in (("trials", plan.trials()), ("runs", plan.experiments())):
        for method in dict.fromkeys(one.method for one in experiments):
            mine = [one for one in experiments if one.method == method]
            epochs = [run_of(plan, folder, configs, one, plan.changes(one)).duration.epochs or 0.0 for one in mine]
            each = sum(epochs) / len(mine) * paces[method].epoch
            yield Line(f"{what} of {method}", len(mine), each + paces[method].evaluation)


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


def measure_own_teacher(plan: Plan, folder: Folder) -> None:
    """Time the cache of a teacher of the equal arm, with random weights."""
    made, cache = folder[f"teachers/{OWN}"], folder[f"caches/{OWN}"]
    pretrain("nothing", plan.pretraining, folder, made)
    build(tars_of(plan, folder), cache, backbone=str(made), image_size=plan.pretraining.image_size, threads=1)
    write_json(_path(folder, OWN), {"seconds": seconds_of(cache, "*")})


def measure_large_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Time a large teacher on a few pictures."""
    cost = plan_cache(tars_of(plan, folder), sample=SAMPLE, threads=1, **backbone(name, plan, folder))
    write_json(_path(folder, name), {"seconds": 3600 * cost.hours})


def measure_method(name: str, plan: Plan, folder: Folder, configs: Path) -> None:
    """Time a few steps of a method, and an evaluation."""
    one = Experiment(name, OWN if plan.methods[name].third else None, None, SEED)
    run = run_of(plan, folder, configs, one, [*plan.changes(one), f"duration={{steps: {STEPS}}}"])
    summary = train(run)
    started = time.perf_counter()
    evaluated(plan, folder, one, Path(run.out), Path(run.out) / "records")
    evaluation = time.perf_counter() - started
    shutil.rmtree(run.out)
    write_json(_path(folder, name), asdict(Pace(summary.samples / summary.images_per_s, evaluation)))


def _path(folder: Folder, name: str) -> Path:
    return folder[f"budget/{name}.json"]
