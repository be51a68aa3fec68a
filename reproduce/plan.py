"""The plan of a reproduction, a file of configs/reproduce: checked, and expanded into single experiments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from threetowers.cache.schema import parse_as
from threetowers.trainer.config import Augment

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
STRICT = ConfigDict(extra="forbid")
THIRD_TOWER = "third"  # its name in the configs of the methods with a third tower
TERM_TEACHER = "terms.image-text.teachers.run"  # the teacher in the configs of the methods that a run teaches


class BadPlan(ValueError):
    """A plan that cannot be carried out; the message names the key, the value found and those expected."""


@pydantic_dataclass(frozen=True, config=STRICT)
class Styles:
    """Art styles of the contrastive data, of the teacher's data, and of the shifted evaluation sets."""

    contrastive: list[str]
    teacher: list[str]
    shift: list[str]


@pydantic_dataclass(frozen=True, config=STRICT)
class Sweep:
    """Learning rates that are tried once a method; no rates for those of the configs."""

    rates: list[Positive]
    epochs: Positive
    seed: int = 0


@pydantic_dataclass(frozen=True, config=STRICT)
class TeacherSource:
    """Where a teacher comes from: pretrained here (`pretrain`), or with the weights of a package.

    `model` and `image_size` replace those of the plan's `pretraining` for this teacher.
    """

    arm: Literal["equal", "large"]
    pretrain: Literal["emoji", "fashion-mnist", "nothing"] | None = None
    model: str | None = None
    backbone: str | None = None
    package: str | None = None
    image_size: PositiveInt | None = None


@pydantic_dataclass(frozen=True, config=STRICT)
class TeacherRun:
    """A finished run of the plan whose embeddings of images and captions teach the methods that are `taught`.

    It is the run of a method, with a teacher if that has a third tower, or of a `variant` of it.
    """

    method: str
    teacher: str | None = None
    variant: str | None = None
    seed: int = 0


@pydantic_dataclass(frozen=True, config=STRICT)
class Pretraining:
    """How the teachers of the equal arm are trained."""

    model: str
    image_size: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    lr: Positive
    crop_scale: Share = 1.0
    augment: Augment = field(default_factory=Augment)
    seed: int = 0


@pydantic_dataclass(frozen=True, config=STRICT)
class CropsView:
    """A cache of stored random crops."""

    teacher: str
    policy: str
    scale: Share


@pydantic_dataclass(frozen=True, config=STRICT)
class Method:
    """A base config with changes.

    A method with `third` reads the cache of each of `teachers`; one that is `taught`, the caches of images and captions
    of each of `teacher_runs`.
    """

    config: str
    third: bool = False
    taught: bool = False
    set: list[str] = field(default_factory=list)


@pydantic_dataclass(frozen=True, config=STRICT)
class GridCell:
    """Methods crossed with teachers, or with runs that teach; `seeds` replace those of the plan."""

    methods: list[str]
    teachers: list[str] = field(default_factory=list)
    seeds: list[int] | None = None


@pydantic_dataclass(frozen=True, config=STRICT)
class ThirdTowerMixing:
    """Shares of the third tower that are mixed into the main tower of a method when it is evaluated."""

    method: str
    shares: list[Share]


@pydantic_dataclass(frozen=True, config=STRICT)
class Variant:
    """A method with changes; `teacher` replaces that of all ablations."""

    method: str
    set: list[str]
    teacher: str | None = None


@pydantic_dataclass(frozen=True, config=STRICT)
class Ablations:
    """Variants of methods, with the seeds and the teacher that they share; `note` is printed beside their results."""

    seeds: list[int]
    teacher: str
    variants: dict[str, Variant]
    note: str = ""


@pydantic_dataclass(frozen=True, config=STRICT)
class QuickPlan:
    """The parts of the plan that its short version keeps, and the values that it replaces."""

    epochs: Positive
    seeds: list[int]
    sweep: bool
    budget_minutes: Positive
    teachers: list[str]
    methods: list[str]
    variants: list[str]
    pretraining_steps: PositiveInt | None = None


@pydantic_dataclass(frozen=True, config=STRICT)
class Plan:
    """Methods, teachers, seeds and ablations of a reproduction.

    `command` carries it out in `folder`, and `claims`, a file beside it, says what is asked of its results; the short
    version has `-quick` at the end of both names.
    """

    command: str
    folder: str
    claims: str
    emoji: str
    styles: Styles
    vocabulary: PositiveInt
    epochs: Positive
    seeds: list[int]
    budget_minutes: Positive
    sweep: Sweep
    teachers: dict[str, TeacherSource]
    methods: dict[str, Method]
    grid: list[GridCell]
    ablations: Ablations
    quick: QuickPlan
    pretraining: Pretraining | None = None
    mixing: ThirdTowerMixing | None = None
    views: dict[str, CropsView] = field(default_factory=dict)
    teacher_runs: dict[str, TeacherRun] = field(default_factory=dict)

    def made_quick(self) -> "Plan":
        """Return the same plan, shortened by its `quick`."""
        quick = self.quick
        grid = []
        for cell in self.grid:
            methods = [name for name in cell.methods if name in quick.methods]
            teachers = [name for name in cell.teachers if name in quick.teachers]
            if methods and (teachers or not self._needs_teacher(cell)):
                grid.append(GridCell(methods, teachers))
        variants = {name: self.ablations.variants[name] for name in quick.variants}
        needed = " ".join(change for variant in variants.values() for change in variant.set)
        pretraining = self.pretraining
        if pretraining is not None and quick.pretraining_steps is not None:
            pretraining = replace(pretraining, steps=quick.pretraining_steps)
        return replace(
            self,
            command=f"{self.command}-quick",
            folder=f"{self.folder}-quick",
            epochs=quick.epochs,
            seeds=quick.seeds,
            budget_minutes=quick.budget_minutes,
            sweep=self.sweep if quick.sweep else replace(self.sweep, rates=[]),
            teachers={name: teacher for name, teacher in self.teachers.items() if name in quick.teachers},
            teacher_runs={name: run for name, run in self.teacher_runs.items() if name in quick.teachers},
            pretraining=pretraining,
            methods={name: self.methods[name] for name in quick.methods},
            grid=grid,
            ablations=replace(self.ablations, seeds=quick.seeds, variants=variants),
            views={name: view for name, view in self.views.items() if f"$caches/{name}" in needed},
        )

    def without(self, teachers: Sequence[str]) -> "Plan":
        """Return the same plan without some teachers and what needs them: methods, variants, and runs that teach."""

        def is_left(changes: Sequence[str]) -> bool:
            return not any(f"/{teacher}" in change for change in changes for teacher in teachers)

        methods = [name for name, method in self.methods.items() if is_left(method.set)]
        variants = {}
        for name, variant in self.ablations.variants.items():
            if variant.method in methods and self.teacher_of(name) not in teachers and is_left(variant.set):
                variants[name] = variant
        runs = {}
        for name, run in self.teacher_runs.items():
            if run.method in methods and run.teacher not in teachers and (not run.variant or run.variant in variants):
                runs[name] = run
        left = {name: teacher for name, teacher in self.teachers.items() if name not in teachers}
        grid = []
        for cell in self.grid:
            kept = [name for name in cell.methods if name in methods]
            among = [name for name in cell.teachers if name in left or name in runs]
            if kept and (among or not self._needs_teacher(cell)):
                grid.append(replace(cell, methods=kept, teachers=among))
        return replace(
            self,
            teachers=left,
            teacher_runs=runs,
            grid=grid,
            ablations=replace(self.ablations, variants=variants),
            views={name: view for name, view in self.views.items() if view.teacher not in teachers},
        )

    def experiments(self) -> "list[Experiment]":
        """Return every experiment: the runs that teach, those of the grid, then the ablations."""
        experiments: dict[Experiment, None] = dict.fromkeys(map(self.teaching_experiment, self.teacher_runs))
        for cell in self.grid:
            for method in cell.methods:
                teachers: list[str | None] = [*cell.teachers] or [None]
                for teacher in teachers:
                    for seed in cell.seeds or self.seeds:
                        experiments[Experiment(method, teacher, None, seed)] = None
        for name, variant in self.ablations.variants.items():
            for seed in self.ablations.seeds:
                experiments[Experiment(variant.method, self.teacher_of(name), name, seed)] = None
        return list(experiments)

    def teaching_experiment(self, name: str) -> "Experiment":
        """Return the experiment of a run that teaches."""
        run = self.teacher_runs[name]
        return Experiment(run.method, run.teacher, run.variant, run.seed)

    def is_taught(self, experiment: "Experiment") -> bool:
        """Return whether a finished run teaches an experiment, which therefore comes after it."""
        return self.methods[experiment.method].taught

    def teacher_of(self, name: str) -> str | None:
        """Return the teacher of a variant, None for a method without a third tower or run that teaches."""
        variant = self.ablations.variants[name]
        method = self.methods[variant.method]
        return (variant.teacher or self.ablations.teacher) if method.third or method.taught else None

    def pretraining_of(self, name: str) -> Pretraining:
        """Return how a teacher is pretrained here."""
        assert self.pretraining is not None  # checked with the plan
        teacher = self.teachers[name]
        model = teacher.model or self.pretraining.model
        return replace(self.pretraining, model=model, image_size=teacher.image_size or self.pretraining.image_size)

    def trials(self) -> "list[Experiment]":
        """Return the experiments of the sweep: each method with the first of its teachers, at every rate."""
        first: dict[str, Experiment] = {}
        for experiment in self.experiments():
            if experiment.variant is None:
                first.setdefault(experiment.method, replace(experiment, seed=self.sweep.seed))
        return [replace(experiment, rate=rate) for experiment in first.values() for rate in self.sweep.rates]

    def changes(self, experiment: "Experiment") -> list[str]:
        """Return the changes of an experiment to its base config, as on the command line, with folders as $names."""
        epochs = self.sweep.epochs if experiment.rate else self.epochs
        changes = [f"seed={experiment.seed}", f"duration={{epochs: {epochs}}}"]
        if self.is_taught(experiment):
            changes += [f"towers.taught_{side}.path=$caches/{experiment.teacher}-{side}" for side in ("image", "text")]
        elif experiment.teacher is not None:
            changes.append(f"towers.{THIRD_TOWER}.path=$caches/{experiment.teacher}")
        changes += self.methods[experiment.method].set
        if experiment.variant is not None:
            changes += self.ablations.variants[experiment.variant].set
        return changes

    def _needs_teacher(self, cell: GridCell) -> bool:
        return any(self.methods[method].third or self.methods[method].taught for method in cell.methods)


@dataclass(frozen=True)
class Experiment:
    """One training run; `rate` is its learning rate in the sweep, None for the one that was chosen."""

    method: str
    teacher: str | None
    variant: str | None
    seed: int
    rate: float | None = None

    @property
    def recipe(self) -> str:
        """The part of its name that other seeds share: METHOD[-TEACHER][-VARIANT]."""
        return "-".join(part for part in (self.method, self.teacher, self.variant) if part)

    @property
    def name(self) -> str:
        """The name of its folder and its records."""
        if self.rate is not None:
            return f"sweep-{self.recipe}-lr{self.rate:g}"
        return f"{self.recipe}-seed{self.seed}"


def load_plan(path: Path) -> Plan:
    """Read the plan of a YAML file.

    Raises:
        BadPlan: For a file that cannot be read or is not a valid plan.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadPlan(f"{path}: cannot be read as YAML: {error}") from error
    return parse_plan(tree, str(path))


def parse_plan(tree: Mapping[str, Any], source: str = "plan") -> Plan:
    """Return the plan of a plain tree.

    Raises:
        BadPlan: For a tree that is not a valid plan.
    """
    plan = parse_as(Plan, tree, BadPlan, f"{source} is not a valid plan")
    _check(plan, source)
    return plan


def _check(plan: Plan, source: str) -> None:
    """Check the names in a plan against each other."""

    def known(key: str, names: Sequence[str], among: Mapping[str, object]) -> None:
        if unknown := [name for name in names if name not in among]:
            raise BadPlan(f"{source}: {key}: {unknown} are unknown, expected some of {sorted(among)}")

    for name, method in plan.methods.items():
        if method.third and method.taught:
            raise BadPlan(f"{source}: methods.{name}: third and taught: expected one of them, the other's path in set")
    for number, cell in enumerate(plan.grid):
        known(f"grid.{number}.methods", cell.methods, plan.methods)
        kinds = {(plan.methods[method].third, plan.methods[method].taught) for method in cell.methods}
        if len(kinds) > 1 or (kinds == {(False, False)}) == bool(cell.teachers):
            raise BadPlan(
                f"{source}: grid.{number}: methods with a third tower need teachers, those that are taught need "
                "teacher_runs, others take none; a cell has methods of one kind"
            )
        known(f"grid.{number}.teachers", cell.teachers, plan.teacher_runs if (False, True) in kinds else plan.teachers)
    for name, run in plan.teacher_runs.items():
        _check_teacher_run(plan, name, run, f"{source}: teacher_runs.{name}")
    for name, teacher in plan.teachers.items():
        if (teacher.pretrain is None) == (teacher.package is None) or (teacher.package and not teacher.backbone):
            raise BadPlan(f"{source}: teachers.{name}: give either pretrain, or a package with its backbone")
        if teacher.pretrain and plan.pretraining is None:
            raise BadPlan(f"{source}: teachers.{name}.pretrain: give the section pretraining, which says how")
        if teacher.model and teacher.package:
            raise BadPlan(
                f"{source}: teachers.{name}.model: a package comes with its backbone; give pretrain, or drop it"
            )
    for name, view in plan.views.items():
        known(f"views.{name}.teacher", [view.teacher], plan.teachers)
    for name, variant in plan.ablations.variants.items():
        known(f"ablations.variants.{name}.method", [variant.method], plan.methods)
        teacher_names = plan.teacher_runs if plan.methods[variant.method].taught else plan.teachers
        known(f"ablations.variants.{name}.teacher", [variant.teacher] if variant.teacher else [], teacher_names)
    known("ablations.teacher", [plan.ablations.teacher], plan.teachers)
    known("mixing.method", [plan.mixing.method] if plan.mixing else [], plan.methods)
    known("quick.teachers", plan.quick.teachers, {**plan.teachers, **plan.teacher_runs})
    known("quick.methods", plan.quick.methods, plan.methods)
    known("quick.variants", plan.quick.variants, plan.ablations.variants)
    needed = [name for name in map(plan.teacher_of, plan.quick.variants) if name is not None]
    known("quick.variants: teachers", needed, dict.fromkeys(plan.quick.teachers))
    styles = [*plan.styles.contrastive, *plan.styles.teacher, *plan.styles.shift]
    if len(set(styles)) < len(styles):
        raise BadPlan(f"{source}: styles: {styles} has a style twice, expected different styles for each use")


def _check_teacher_run(plan: Plan, name: str, run: TeacherRun, where: str) -> None:
    """Check that a run which teaches is one that the plan can carry out first."""
    method = plan.methods.get(run.method)
    if method is None or method.taught:
        expected = sorted(known for known, other in plan.methods.items() if not other.taught)
        raise BadPlan(f"{where}.method: found {run.method!r}, expected one of {expected}, which no run teaches")
    if name in plan.teachers or name in plan.methods:
        raise BadPlan(f"{where}: {name!r} names a teacher or a method, too: expected another name")
    if method.third != (run.teacher is not None) or (run.teacher is not None and run.teacher not in plan.teachers):
        expected = sorted(plan.teachers) if method.third else ["null: the method has no third tower"]
        raise BadPlan(f"{where}.teacher: found {run.teacher!r}, expected one of {expected}")
    if run.variant is None:
        return
    variant = plan.ablations.variants.get(run.variant)
    if variant is None or variant.method != run.method:
        expected = sorted(known for known, other in plan.ablations.variants.items() if other.method == run.method)
        raise BadPlan(f"{where}.variant: found {run.variant!r}, expected one of {expected}, the method's ablations")
