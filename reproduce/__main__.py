"""`python -m reproduce`: run what configs/reproduce plans, whatever of it is not there yet, and write the report."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import tyro

from reproduce import budget
from reproduce.claims import load_claims
from reproduce.experiment import changes_of, is_finished, perform
from reproduce.folder import Folder, read_json, write_json
from reproduce.materials import prepare
from reproduce.packages import NotAvailable
from reproduce.plan import Experiment, Plan, load_plan
from reproduce.pool import Task, perform_all
from reproduce.report.page import write_report
from reproduce.sweep import choose_rates
from reproduce.teachers import cache_teacher, cache_view, fetch, is_built

logger = logging.getLogger(__name__)


def reproduce(
    quick: bool = False,
    out: Path | None = None,
    configs: Path = Path("configs/reproduce"),
    workers: int = 2,
    only: Literal["all", "budget", "report"] = "all",
) -> None:
    """Train and evaluate what configs/reproduce/experiments.yaml lists, and judge the papers' claims by it.

    Each step whose result is in the folder is skipped: run it again after an interruption, or when the plan has grown.

    Args:
        quick: A short version, by the plan's `quick`; its report stays in its folder.
        out: Folder of everything; default: runs/reproduce, or runs/reproduce-quick.
        configs: Folder of the plan, the claims, the base configs and the descriptions of the evaluation sets.
        workers: Runs side by side, one core each; 0: one after the other, in this process.
        only: all; budget: print the arithmetic and stop; report: write the report of what is finished.
    """
    plan, claims = load_plan(configs / "experiments.yaml"), load_claims(configs / "claims.yaml")
    plan = plan.made_quick() if quick else plan
    folder = Folder(out or Path("runs/reproduce-quick" if quick else "runs/reproduce"))
    report = folder.path if quick or out is not None else Path("docs")
    command = "make reproduce-quick" if quick else "make reproduce"
    if only != "report":
        plan, missing = carry_out(plan, folder, configs, workers, stop=only == "budget")
        if only == "budget":
            return
    else:
        missing = read_json(folder["missing.json"])
        plan = plan.without(list(missing))
    write_report(plan, claims, folder, report, command, missing)
    print(f"report: {report / 'RESULTS.md'}, {report / 'results.html'}")


def carry_out(plan: Plan, folder: Folder, configs: Path, workers: int, stop: bool) -> tuple[Plan, Mapping[str, str]]:
    """Do what is not done; return what of the plan could be carried out, and why not the rest."""
    prepare(plan, folder, configs)
    missing: dict[str, str] = {}
    for name, teacher in plan.teachers.items():
        try:
            fetch(name, teacher, folder)
        except NotAvailable as error:
            missing[name] = str(error)
            logger.warning("teacher %s is left out: %s", name, error)
    write_json(folder["missing.json"], missing)
    plan = plan.without(list(missing))
    budget.measure(plan, folder, configs, workers)
    print(budget.table(budget.lines(plan, folder, configs), workers, plan.budget_minutes), flush=True)
    if not stop:
        new = [name for name in plan.teachers if not folder[f"fits/{name}.json"].exists()]
        perform_all([Task(name, cache_teacher, (name, plan, folder)) for name in new], workers, "teacher")
        new = [name for name in plan.views if not is_built(folder[f"caches/{name}"])]
        perform_all([Task(name, cache_view, (name, plan, folder)) for name in new], workers, "view")
        _perform(plan, folder, configs, plan.trials(), {}, workers, "trial")
        rates = choose_rates(plan, folder)
        _perform(plan, folder, configs, plan.experiments(), rates, workers, "run")
    return plan, missing


def _perform(
    plan: Plan,
    folder: Folder,
    configs: Path,
    experiments: list[Experiment],
    rates: dict[str, float],
    workers: int,
    what: str,
) -> None:
    tasks = []
    for one in experiments:
        changes = changes_of(plan, one, rates)
        if not is_finished(folder, one, changes):
            tasks.append(Task(one.name, perform, (plan, folder, configs, one, changes)))
    perform_all(tasks, workers, what)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("reproduce", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        tyro.cli(reproduce, prog="reproduce")
    except (ValueError, OSError) as error:
        sys.exit(f"reproduce: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
