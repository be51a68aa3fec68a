"""`python -m reproduce`: run the experiments of configs/reproduce that are not finished, and write the report."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro

from reproduce.budget import budget_table, estimate_budget, measure_work
from reproduce.claims import load_claims
from reproduce.experiment import all_changes, is_finished, run_experiment
from reproduce.folder import Folder, read_json, write_json
from reproduce.materials import prepare_materials
from reproduce.packages import NotAvailable
from reproduce.plan import Experiment, Plan, load_plan
from reproduce.pool import Task, run_tasks
from reproduce.report.page import write_report
from reproduce.run_teachers import cache_run, is_run_cached, learned_temperatures
from reproduce.scores import choose_rates
from reproduce.teachers import cache_teacher, cache_view, fetch, is_built

logger = logging.getLogger(__name__)


def reproduce(
    plan: str = "experiments",
    quick: bool = False,
    out: Path | None = None,
    configs: Path = Path("configs/reproduce"),
    workers: int = 2,
    only: Literal["all", "budget", "report"] = "all",
) -> None:
    """Train and evaluate the experiments of a plan, and test its claims.

    Each step whose result is in the folder is skipped: run it again after an interruption, or when the plan has grown.

    Args:
        plan: Name of the plan, a file of `configs`: experiments, or distillation.
        quick: Run a short version, by the plan's `quick`; its report is written into its folder.
        out: Folder of all files; by default the plan's, as runs/reproduce or runs/reproduce-quick.
        configs: Folder of the plans, the claims, the base configs and the configs of the evaluation sets.
        workers: Number of runs side by side, one core each; with 0 they run one after the other in this process.
        only: all; budget to print the estimate and stop; report to write the report of the finished experiments.
    """
    planned = load_plan(configs / f"{plan}.yaml")
    claims = load_claims(configs / planned.claims)
    if quick:
        planned = planned.made_quick()
    folder = Folder(out or Path(planned.folder))
    report = folder.path if quick or out is not None else Path("docs")
    if only != "report":
        planned, missing = carry_out(planned, folder, configs, workers, estimate_only=only == "budget")
        if only == "budget":
            return
    else:
        missing = read_json(folder["missing.json"])
        planned = planned.without(list(missing))
    files = write_report(planned, claims, folder, report, missing)
    print(f"report: {', '.join(map(str, files))}")


def carry_out(
    plan: Plan, folder: Folder, configs: Path, workers: int, *, estimate_only: bool = False
) -> tuple[Plan, Mapping[str, str]]:
    """Run the steps of a plan that are not done.

    Returns:
        The plan without the teachers that cannot be obtained, and the reason for each of these.
    """
    # Data, and the parts of teachers that are downloaded.
    prepare_materials(plan, folder, configs)
    missing: dict[str, str] = {}
    for name, teacher in plan.teachers.items():
        try:
            fetch(name, teacher, folder)
        except NotAvailable as error:
            missing[name] = str(error)
            logger.warning("teacher %s is left out: %s", name, error)
    write_json(folder["missing.json"], missing)
    plan = plan.without(list(missing))

    # The time that the rest will take.
    measure_work(plan, folder, configs, workers)
    print(budget_table(estimate_budget(plan, folder, configs), workers, plan.budget_minutes), flush=True)
    if estimate_only:
        return plan, missing

    # Caches.
    new = [name for name in plan.teachers if not folder[f"fits/{name}.json"].exists()]
    run_tasks([Task(name, cache_teacher, (name, plan, folder)) for name in new], workers, "teacher")
    new = [name for name in plan.views if not is_built(folder[f"caches/{name}"])]
    run_tasks([Task(name, cache_view, (name, plan, folder)) for name in new], workers, "view")

    # Runs, with the learning rates that the trials choose; those that finished runs teach come after these.
    def run_all(experiments: Sequence[Experiment], taught: bool, rates: Mapping[str, float], what: str) -> None:
        temperatures = learned_temperatures(plan, folder)
        tasks = []
        for experiment in experiments:
            if plan.is_taught(experiment) != taught:
                continue
            changes = all_changes(plan, experiment, rates, temperatures)
            if not is_finished(folder, experiment, changes):
                tasks.append(Task(experiment.name, run_experiment, (plan, folder, configs, experiment, changes)))
        run_tasks(tasks, workers, what)

    for taught in (False, True):
        if taught:
            new = [name for name in plan.teacher_runs if not is_run_cached(name, folder)]
            run_tasks([Task(name, cache_run, (name, plan, folder)) for name in new], workers, "cache of a run")
        run_all(plan.trials(), taught, {}, "trial")
        run_all(plan.experiments(), taught, choose_rates(plan, folder), "run")
    return plan, missing


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("reproduce", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        tyro.cli(reproduce, prog="reproduce")
    except (ValueError, OSError) as error:
        sys.exit(f"reproduce: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
