"""The estimate of a plan from made-up seconds."""

from dataclasses import replace
from pathlib import Path

from reproduce.budget import BudgetLine, RunSeconds, TeacherSeconds, budget_lines, budget_table, kind_of
from reproduce.folder import Folder
from reproduce.plan import Variant, load_plan

CONFIGS = Path(__file__).parents[2] / "configs/reproduce"


def test_work_is_runs_times_seconds(tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / "experiments.yaml").made_quick()
    teachers = {"in-domain": TeacherSeconds(5, 60), "random": TeacherSeconds(5), "lite0": TeacherSeconds(100)}
    runs = {"clip": RunSeconds(2.0, 1.0), "lit": RunSeconds(1.0, 1.0), "3t": RunSeconds(3.0, 2.0)}
    lines = list(budget_lines(plan, Folder(tmp_path), CONFIGS, teachers, runs))
    assert lines == [
        BudgetLine("pretraining of in-domain", 1, 60.0),
        BudgetLine("cache of in-domain", 1, 5.0),
        BudgetLine("pretraining of random", 1, 0.0),
        BudgetLine("cache of random", 1, 5.0),
        BudgetLine("cache of lite0", 1, 100.0),
        BudgetLine("runs of clip", 2, 4 * 2.0 + 1),
        BudgetLine("runs of lit", 6, 4 * 1.0 + 1),
        BudgetLine("runs of 3t", 6 + 4, 4 * 3.0 + 2),
    ]


def test_longer_ablations_take_longer(tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / "experiments.yaml")
    variants = {"longer": Variant("clip", ["duration={epochs: 24}"]), "other": Variant("clip", ["embed_dim=64"])}
    plan = replace(plan, epochs=12, ablations=replace(plan.ablations, variants=variants))
    runs = {method: RunSeconds(1.0, 0.0) for method in plan.methods}
    teachers = dict.fromkeys(plan.teachers, TeacherSeconds(0.0))
    lines = {line.what: line for line in budget_lines(plan, Folder(tmp_path), CONFIGS, teachers, runs)}
    assert lines["runs of clip"].total == 4 * 12 + 2 * (24 + 12)
    assert lines["trials of clip"].total == 3 * 8


def test_a_variant_with_its_own_teacher_is_timed_separately() -> None:
    plan = load_plan(CONFIGS / "experiments.yaml")
    kinds = {kind_of(plan, experiment) for experiment in plan.experiments()}
    assert kinds == {*plan.methods, "3t-64px-3t", "lit-64px-lit", "3t-resnet18-3t", "lit-resnet18-lit"}


def test_runs_that_teach_are_timed_with_their_caches(tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / "distillation.yaml")
    seconds = {"lite0": TeacherSeconds(100), "lit-lite0": TeacherSeconds(20), "wide-3t": TeacherSeconds(30)}
    runs = {kind_of(plan, experiment): RunSeconds(1.0, 5.0) for experiment in plan.experiments()}
    lines = {line.what: line for line in budget_lines(plan, Folder(tmp_path), CONFIGS, seconds, runs)}
    assert lines["caches of lit-lite0"].total == 20
    assert lines["runs of 3t-wide"].total == 24 + 5
    assert lines["runs of distill"] == BudgetLine("runs of distill", 2 * 4, 12 + 5)
    assert lines["trials of 3t-distill"] == BudgetLine("trials of 3t-distill", 3, 6 + 5)
    assert "trials of 3t-wide" not in lines


def test_a_plan_above_the_budget_is_reported() -> None:
    lines = [BudgetLine("runs", 10, 60.0)]
    assert "10 core minutes, 5 min on 2 cores; the budget is 6 min" in budget_table(lines, 2, 6)
    assert "more than the budget" not in budget_table(lines, 2, 6)
    assert "more than the budget" in budget_table(lines, 2, 4)
