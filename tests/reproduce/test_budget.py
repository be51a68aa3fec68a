"""The arithmetic of a plan, on paces made up here."""

from dataclasses import replace
from pathlib import Path

from reproduce.budget import Line, Pace, TeacherPace, kind_of, table, work
from reproduce.folder import Folder
from reproduce.plan import Variant, load_plan

CONFIGS = Path(__file__).parents[2] / "configs/reproduce"


def test_work_is_runs_times_seconds(tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / "experiments.yaml").made_quick()
    teachers = {"in-domain": TeacherPace(5, 60), "random": TeacherPace(5), "lite0": TeacherPace(100)}
    paces = {"clip": Pace(2.0, 1.0), "lit": Pace(1.0, 1.0), "3t": Pace(3.0, 2.0)}
    lines = list(work(plan, Folder(tmp_path), CONFIGS, teachers, paces))
    assert lines == [
        Line("pretraining of in-domain", 1, 60.0),
        Line("cache of in-domain", 1, 5.0),
        Line("pretraining of random", 1, 0.0),
        Line("cache of random", 1, 5.0),
        Line("cache of lite0", 1, 100.0),
        Line("runs of clip", 2, 4 * 2.0 + 1),
        Line("runs of lit", 6, 4 * 1.0 + 1),
        Line("runs of 3t", 6 + 4, 4 * 3.0 + 2),
    ]


def test_longer_ablations_count_as_long_as_they_are(tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / "experiments.yaml")
    variants = {"longer": Variant("clip", ["duration={epochs: 24}"]), "other": Variant("clip", ["embed_dim=64"])}
    plan = replace(plan, epochs=12, ablations=replace(plan.ablations, variants=variants))
    paces = {method: Pace(1.0, 0.0) for method in plan.methods}
    teachers = dict.fromkeys(plan.teachers, TeacherPace(0.0))
    lines = {line.what: line for line in work(plan, Folder(tmp_path), CONFIGS, teachers, paces)}
    assert lines["runs of clip"].total == 4 * 12 + 2 * (24 + 12)
    assert lines["trials of clip"].total == 3 * 8


def test_a_run_beside_a_teacher_of_another_size_is_timed_by_itself() -> None:
    plan = load_plan(CONFIGS / "experiments.yaml")
    kinds = {kind_of(plan, one) for one in plan.experiments()}
    assert kinds == {*plan.methods, "3t-64px-3t", "lit-64px-lit", "3t-resnet18-3t", "lit-resnet18-lit"}


def test_more_than_the_budget_is_said() -> None:
    lines = [Line("runs", 10, 60.0)]
    assert "10 core minutes, 5 min on 2 cores; the budget is 6 min" in table(lines, 2, 6)
    assert "more than the budget" not in table(lines, 2, 6)
    assert "more than the budget" in table(lines, 2, 4)
