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
def test_every_config_is_valid(plan: Plan, quick: bool, tmp_path: Path) -> None:
    plan = plan.made_quick() if quick else plan
    folder = Folder(tmp_path)
    caches = {*plan.teachers, *plan.views}
    for experiment in [*plan.experiments(), *plan.trials()]:
        run = train_config(plan, folder, CONFIGS, experiment, all_changes(plan, experiment, {experiment.method: 0.5}))
        assert run.seed == experiment.seed
        assert run.optim.lr == (0.5 if experiment.rate is None else experiment.rate)
        for tower in run.towers.values():
            if isinstance(tower, CacheTower):
                assert Path(tower.path).parent == folder["caches"]
                assert Path(tower.path).name in caches


def test_all_methods_get_the_same_data_steps_and_batch(plan: Plan, tmp_path: Path) -> None:
    grid = [experiment for experiment in plan.experiments() if experiment.variant is None]
    runs = [
        train_config(plan, Folder(tmp_path), CONFIGS, experiment, all_changes(plan, experiment, {}))
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


def test_claims_and_trends_name_planned_runs(plan: Plan) -> None:
    planned: set[tuple[str, str | None, str | None]] = set()
    for experiment in plan.experiments():
        planned.add((experiment.method, None if experiment.variant else experiment.teacher, experiment.variant))
    claims = load_claims(CONFIGS / "claims.yaml")
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
    run = train_config(plan, Folder(tmp_path), CONFIGS, experiment, all_changes(plan, experiment, {}))
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
