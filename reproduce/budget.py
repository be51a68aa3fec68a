"""What a plan will take, before it is begun: runs times seconds, from one short measured run a method."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def measure(plan: Plan, folder: Folder, configs: Path) -> list[Line]:
    """Return the work of a plan. What of it was measured before is in the folder; the rest is measured on one core.

    Ablations are taken to be as fast as their method, and pretraining, a run or two, is left out.
    """
    path = folder["budget.json"]
    found: dict[str, Any] = read_json(path) if path.exists() else {"caches": {}, "methods": {}}
    torch.set_num_threads(1)
    if MEASURED not in found["caches"]:
        found["caches"][MEASURED] = _own_teacher(plan, folder)
        write_json(path, found)
    for name, teacher in plan.teachers.items():
        if teacher.arm == "large" and name not in found["caches"]:
            cost = plan_cache(tars_of(plan, folder), sample=SAMPLE, threads=1, **backbone(name, plan, folder))
            found["caches"][name] = 3600 * cost.hours
            write_json(path, found)
    for method in dict.fromkeys(one.method for one in plan.experiments()):
        if method not in found["methods"]:
            found["methods"][method] = asdict(_pace(method, plan, folder, configs))
            write_json(path, found)
    paces = {method: Pace(**pace) for method, pace in found["methods"].items()}
    return list(work(plan, folder, configs, found["caches"], paces))


def work(
    plan: Plan, folder: Folder, configs: Path, caches: Mapping[str, float], paces: Mapping[str, Pace]
) -> Iterator[Line]:
    """The arithmetic: each kind of work, how often, and its seconds. `caches`: seconds by large teacher, or our own."""
    for name, teacher in plan.teachers.items():
        yield Line(f"cache of {name}", 1, caches[MEASURED if teacher.arm == "equal" else name])
    if plan.views:
        yield Line("caches of further views", len(plan.views), caches[MEASURED])
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


def _own_teacher(plan: Plan, folder: Folder) -> float:
    made, cache = folder[f"teachers/{MEASURED}"], folder[f"caches/{MEASURED}"]
    pretrain("nothing", plan.pretraining, folder, made)
    build(tars_of(plan, folder), cache, backbone=str(made), image_size=plan.pretraining.image_size, threads=1)
    return seconds_of(cache, "*")


def _pace(method: str, plan: Plan, folder: Folder, configs: Path) -> Pace:
    one = Experiment(method, MEASURED if plan.methods[method].third else None, None, SEED)
    run = run_of(plan, folder, configs, one, [*plan.changes(one), f"duration={{steps: {STEPS}}}"])
    summary = train(run)
    started = time.perf_counter()
    evaluated(plan, folder, one, Path(run.out), Path(run.out) / "records")
    evaluation = time.perf_counter() - started
    shutil.rmtree(run.out)
    return Pace(summary.samples / summary.images_per_s, evaluation)
