"""The plan: its experiments, its short version, missing teachers, and bad plans."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from reproduce.claims import load_claims
from reproduce.experiment import all_changes, train_config
from reproduce.folder import Folder
from reproduce.plan import BadPlan, Experiment, Plan, load_plan, parse_plan
from threetowers.eval.datasets.dataset_config import parse_dataset_config
from threetowers.trainer.config import CacheTower, ImageTower

CONFIGS = Path(__file__).parents[2] / "configs/reproduce"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(CONFIGS / "experiments.yaml")


def tree() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / "experiments.yaml").read_text())
    return found


def test_grid_crosses_methods_and_teachers_with_three_seeds(plan: Plan) -> None:
    experiments = plan.experiments()
    assert len({experiment.name for experiment in experiments}) == len(experiments)
    for method in ("lit", "3t"):
        for teacher in {name for cell in plan.grid for name in cell.teachers}:
            seeds = {e.seed for e in experiments if (e.method, e.teacher, e.variant) == (method, teacher, None)}
            assert len(seeds) >= 3
    assert {e.method for e in experiments} == set(plan.methods)
    assert {e.variant for e in experiments} == {None, *plan.ablations.variants}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["experiments", "distillation"])
def test_every_config_is_valid(name: str, quick: bool, tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / f"{name}.yaml")
    plan = plan.made_quick() if quick else plan
    folder = Folder(tmp_path)
    caches = {*plan.teachers, *plan.views}
    caches |= {f"{run}-{side}" for run in plan.teacher_runs for side in ("image", "text")}
    for experiment in [*plan.experiments(), *plan.trials()]:
        run = train_config(
            plan, folder, CONFIGS, experiment, all_changes(plan, experiment, {experiment.method: 0.5}, {})
        )
        assert run.seed == experiment.seed
        assert run.optim.lr == (0.5 if experiment.rate is None else experiment.rate)
        for tower in run.towers.values():
            if isinstance(tower, CacheTower):
                assert Path(tower.path).parent == folder["caches"]
                assert Path(tower.path).name in caches


@pytest.mark.parametrize("name", ["experiments", "distillation"])
def test_all_methods_get_the_same_data_steps_and_batch(name: str, tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / f"{name}.yaml")
    grid = [experiment for experiment in plan.experiments() if experiment.variant is None]
    runs = [
        train_config(plan, Folder(tmp_path), CONFIGS, experiment, all_changes(plan, experiment, {}, {}))
        for experiment in grid
    ]
    assert len({(str(run.data), run.global_batch_size, run.duration) for run in runs}) == 1


def test_trials_are_one_a_method_and_rate(plan: Plan) -> None:
    trials = plan.trials()
    assert len(trials) == len(plan.methods) * len(plan.sweep.rates)
    assert {experiment.teacher for experiment in trials if experiment.method == "3t"} == {"in-domain"}
    assert "epochs: 8" in plan.changes(trials[0])[1]
    assert plan.made_quick().trials() == []


def test_missing_teachers_remove_their_experiments(plan: Plan) -> None:
    left = plan.without(["lite0", "fashion"])
    assert {experiment.teacher for experiment in left.experiments()} == {None, *plan.teachers} - {"lite0", "fashion"}
    assert {"64px-3t", "64px-lit"} <= plan.ablations.variants.keys()
    assert not {"64px-3t", "64px-lit"} & plan.without(["in-domain-64px"]).ablations.variants.keys()
    assert "two-teachers" not in left.ablations.variants
    assert "two-teachers" in plan.ablations.variants
    alone = plan.without(list(plan.teachers))
    assert {experiment.method for experiment in alone.experiments()} == {"clip", "vit-clip", "ms-clip"}


@pytest.mark.parametrize("name", ["experiments", "distillation"])
def test_claims_and_trends_name_planned_runs(name: str) -> None:
    plan = load_plan(CONFIGS / f"{name}.yaml")
    planned: set[tuple[str, str | None, str | None]] = set()
    for experiment in plan.experiments():
        planned.add((experiment.method, None if experiment.variant else experiment.teacher, experiment.variant))
    claims = load_claims(CONFIGS / plan.claims)
    asked = [(side, teacher) for c in claims.claims for side in (c.first, c.second) for teacher in c.teachers or [None]]
    asked += [(side, trend.teacher) for trend in claims.trends for sides in trend.at.values() for side in sides]
    for side, teacher in asked:
        method, _, variant = side.partition("+")[0].partition("/")
        assert {(method, None if variant else teacher, variant or None), (method, None, variant or None)} & planned, (
            side
        )


def test_an_ablation_may_have_a_teacher_of_its_own_size(plan: Plan, tmp_path: Path) -> None:
    small, large = plan.pretraining_of("in-domain"), plan.pretraining_of("in-domain-resnet18")
    assert (small.model, large.model, small.steps) == ("resnet10t", "resnet18", large.steps)
    assert plan.pretraining_of("in-domain-64px").image_size == 64
    experiment = next(experiment for experiment in plan.experiments() if experiment.variant == "resnet18-3t")
    run = train_config(plan, Folder(tmp_path), CONFIGS, experiment, all_changes(plan, experiment, {}, {}))
    image, third = run.towers["image"], run.towers["third"]
    assert isinstance(image, ImageTower)
    assert isinstance(third, CacheTower)
    assert (image.model, Path(third.path).name) == ("resnet18", "in-domain-resnet18")


def test_evaluation_sets_use_the_styles_of_the_plan(plan: Plan) -> None:
    folder = Folder(Path("elsewhere"))
    for path in sorted((CONFIGS / "sets").glob("*.yaml")):
        named = {name: str(getattr(plan.styles, name)) for name in ("contrastive", "teacher", "shift")}
        text = folder.substitute(path.read_text(), emoji=plan.emoji, **named)
        config = parse_dataset_config(yaml.safe_load(text), str(path))
        assert config.filter["style"] == plan.styles.contrastive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "epoch"),
        ({"grid": [{"methods": ["clap"]}]}, r"grid.0.methods: \['clap'\] are unknown, expected some of"),
        ({"grid": [{"methods": ["3t"]}]}, "methods with a third tower need teachers"),
        ({"styles": {"contrastive": ["a"], "teacher": ["a"], "shift": ["b"]}}, "has a style twice"),
        ({"teachers": {"in-domain": {"arm": "equal"}}}, "unknown|either pretrain, or a package"),
        (
            {"ablations": tree()["ablations"] | {"variants": {"a": {"method": "3t", "set": [], "teacher": "b"}}}},
            r"ablations.variants.a.teacher: \['b'\] are unknown",
        ),
        (
            {"teachers": tree()["teachers"] | {"lite0": tree()["teachers"]["lite0"] | {"model": "resnet18"}}},
            "teachers.lite0.model: a package comes with its backbone",
        ),
        ({"quick": tree()["quick"] | {"variants": ["64px-3t"]}}, r"quick.variants: teachers: \['in-domain-64px'\]"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        parse_plan({**tree(), **change})


def test_names_of_experiments() -> None:
    assert Experiment("3t", "lite0", None, 1).name == "3t-lite0-seed1"
    assert Experiment("3t", "in-domain", "live", 0).name == "3t-in-domain-live-seed0"
    assert Experiment("clip", None, None, 0, rate=3e-4).name == "sweep-clip-lr0.0003"


@pytest.fixture(scope="module")
def distillation() -> Plan:
    return load_plan(CONFIGS / "distillation.yaml")


def test_students_have_equal_towers_and_every_seed_of_the_plan(distillation: Plan, tmp_path: Path) -> None:
    towers = set()
    seeds: dict[str, set[int]] = {}
    teaching = set(map(distillation.teaching_experiment, distillation.teacher_runs))
    for experiment in distillation.experiments():
        if experiment in teaching:
            continue
        changes = all_changes(distillation, experiment, {}, {})
        run = train_config(distillation, Folder(tmp_path), CONFIGS, experiment, changes)
        towers.add((str(run.towers["image"]), str(run.towers["text"]), run.embed_dim))
        seeds.setdefault(experiment.recipe, set()).add(experiment.seed)
    assert len(towers) == 1
    assert len(seeds) == 6
    assert set(map(frozenset, seeds.values())) == {frozenset(distillation.seeds)}
    assert len(distillation.seeds) >= 4


def test_runs_that_teach_come_first_and_are_taught_by_none(distillation: Plan) -> None:
    first, second, *others = distillation.experiments()
    assert [first, second] == [*map(distillation.teaching_experiment, ("wide-3t", "lit-lite0"))]
    assert not any(map(distillation.is_taught, (first, second)))
    taught = [experiment for experiment in others if distillation.is_taught(experiment)]
    assert {experiment.teacher for experiment in taught} == distillation.teacher_runs.keys()
    assert {experiment.method for experiment in taught} == {"distill", "3t-distill"}


def test_the_temperature_of_the_teacher_is_a_change_of_its_students_alone(distillation: Plan) -> None:
    temperatures = {"lit-lite0": 0.0625}
    by_lit, by_wide = (Experiment("distill", teacher, None, 0) for teacher in ("lit-lite0", "wide-3t"))
    assert all_changes(distillation, by_lit, {}, temperatures)[-1].endswith("teachers.run.temperature=0.0625")
    for other in (by_wide, Experiment("clip", None, None, 0), distillation.teaching_experiment("lit-lite0")):
        assert not any("temperature" in change for change in all_changes(distillation, other, {}, temperatures))


def test_without_its_classifier_a_plan_loses_what_stands_on_it(distillation: Plan) -> None:
    left = distillation.without(["lite0"])
    assert {experiment.method for experiment in left.experiments()} == {"clip"}
    assert (left.teachers, left.teacher_runs, left.ablations.variants) == ({}, {}, {})


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (
            {"a": {"method": "distill"}},
            r"teacher_runs.a.method: found 'distill', expected one of \['3t', 'clip', 'lit'\]",
        ),
        ({"lite0": {"method": "clip"}}, "teacher_runs.lite0: 'lite0' names a teacher or a method, too"),
        ({"a": {"method": "lit"}}, r"teacher_runs.a.teacher: found None, expected one of \['lite0'\]"),
        (
            {"a": {"method": "clip", "teacher": "lite0"}},
            "teacher_runs.a.teacher: found 'lite0', expected one of .'null",
        ),
        ({"a": {"method": "clip", "variant": "wide"}}, r"teacher_runs.a.variant: found 'wide', expected one of \[\]"),
    ],
)
def test_a_run_that_cannot_teach_is_refused(runs: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = yaml.safe_load((CONFIGS / "distillation.yaml").read_text())
    with pytest.raises(BadPlan, match=message):
        parse_plan(plain | {"teacher_runs": plain["teacher_runs"] | runs})
