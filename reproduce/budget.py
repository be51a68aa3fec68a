"""What a plan will take, before it is begun: runs times seconds, from one short measured run a method."""

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reproduce.experiment import evaluated, run_of
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import Experiment, Plan
from reproduce.pretraining import pretrain
from reproduce.teachers import backbone, seconds_of, tars_of
from threetowers.cache.build import build
from threetowers.cache.plan import plan as plan_cache
from threetowers.trainer.loop import train

STEPS = 12
SAMPLE = 32  # pictures that a large teacher is timed on
MEASURED = "measured"
SEED = 1_000_000  # of measured runs: no plan has it, so that the folder is theirs alone


@dataclass(frozen=True)
class Line:
    """So many pieces of work of so many seconds, on one core each."""

    what: str
    count: int
    seconds: float

    @property
    def total(self) -> float:
        return self.count * self.seconds


def measure(plan: Plan, folder: Folder, configs: Path) -> list[Line]:
    """Return the work of a plan: the lines in the folder where they are there, else measured now, on one core."""
    path = folder["budget.json"]
    if not path.exists():
        torch.set_num_threads(1)
        lines = [*_teachers(plan, folder), *_methods(plan, folder, configs)]
        write_json(path, {"lines": [dataclasses.asdict(line) for line in lines]})
    return [Line(**line) for line in read_json(path)["lines"]]


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


def _teachers(plan: Plan, folder: Folder) -> Iterator[Line]:
    """Pretraining is left out: it is a run or two."""
    made, cache = folder[f"teachers/{MEASURED}"], folder[f"caches/{MEASURED}"]
    pretrain("nothing", plan.pretraining, folder, made)
    tars = tars_of(plan, folder)
    build(tars, cache, backbone=str(made), image_size=plan.pretraining.image_size, threads=1)
    equal = [name for name, teacher in plan.teachers.items() if teacher.arm == "equal"]
    yield Line("cache, equal arm", len(equal) + len(plan.views), seconds_of(cache, "*"))
    for name, teacher in plan.teachers.items():
        if teacher.arm == "large":
            cost = plan_cache(tars, sample=SAMPLE, threads=1, **backbone(name, plan, folder))
            yield Line(f"cache, {name}", 1, 3600 * cost.hours)


def _methods(plan: Plan, folder: Folder, configs: Path) -> Iterator[Line]:
    """Each method is trained for some steps, and evaluated in full; its ablations are as fast as it is."""
    epochs: dict[str, list[float]] = {}
    for one in plan.experiments():
        duration = run_of(plan, folder, configs, one, plan.changes(one)).duration
        epochs.setdefault(one.method, []).append(duration.epochs or plan.epochs)
    trials = Counter(one.method for one in plan.trials())
    for method, each in epochs.items():
        third = plan.methods[method].third
        one = Experiment(method, MEASURED if third else None, None, SEED)
        changes = [*plan.changes(one), f"duration={{steps: {STEPS}}}"]
        run = run_of(plan, folder, configs, one, changes)
        summary = train(run)
        started = time.perf_counter()
        evaluated(plan, folder, one, Path(run.out), Path(run.out) / "records")  # a process reads the pictures once
        evaluation = time.perf_counter() - started
        shutil.rmtree(run.out)
        yield Line(f"{method}, trained", len(each), sum(each) / len(each) * summary.samples / summary.images_per_s)
        yield Line(f"{method}, evaluated", len(each), evaluation)
        if method in trials:
            yield Line(f"{method}, swept", trials[method], plan.sweep.epochs * summary.samples / summary.images_per_s)
