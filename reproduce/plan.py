"""The experiments as data: configs/reproduce/experiments.yaml, checked, and spread out into single runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from threetowers.cache.schema import parse_as
from threetowers.trainer.config import Augment

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
STRICT = ConfigDict(extra="forbid")


class BadPlan(ValueError):
    """A plan that cannot be carried out. The message names the key, what it holds and what it may hold."""


@checked(frozen=True, config=STRICT)
class Styles:
    """Art styles by what they serve."""

    contrastive: list[str]
    teacher: list[str]
    shift: list[str]


@checked(frozen=True, config=STRICT)
class Sweep:
    rates: list[Positive]
    epochs: Positive
    seed: int = 0


@checked(frozen=True, config=STRICT)
class Teacher:
    """A third tower: pretrained here (`pretrain`), or with the weights of a package.

    One that is pretrained here is made as `pretraining` says, but for a `model` or an `image_size` of its own.
    """

    arm: Literal["equal", "large"]
    pretrain: Literal["emoji", "fashion-mnist", "nothing"] | None = None
    model: str | None = None
    backbone: str | None = None
    package: str | None = None
    image_size: PositiveInt | None = None


@checked(frozen=True, config=STRICT)
class Pretraining:
    """How the teachers of the equal arm are made."""

    model: str
    image_size: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    lr: Positive
    crop_scale: Share = 1.0
    augment: Augment = field(default_factory=Augment)
    seed: int = 0


@checked(frozen=True, config=STRICT)
class CropsView:
    """A cache of stored crops."""

    teacher: str
    policy: str
    scale: Share


@checked(frozen=True, config=STRICT)
class Method:
    """A base config, with changes; `third` says that it reads the cache of a teacher."""

    config: str
    third: bool = False
    set: list[str] = field(default_factory=list)


@checked(frozen=True, config=STRICT)
class Cell:
    """Methods crossed with teachers; methods without a third tower name none. `seeds`: where not those of the plan."""

    methods: list[str]
    teachers: list[str] = field(default_factory=list)
    seeds: list[int] | None = None


@checked(frozen=True, config=STRICT)
class Mixing:
    method: str
    tower: str
    shares: list[Share]


@checked(frozen=True, config=STRICT)
class Variant:
    """A method with changes; `teacher`: where not that of all ablations."""

    method: str
    set: list[str]
    teacher: str | None = None


@checked(frozen=True, config=STRICT)
class Ablations:
    seeds: list[int]
    teacher: str
    variants: dict[str, Variant]


@checked(frozen=True, config=STRICT)
class Quick:
    epochs: Positive
    seeds: list[int]
    sweep: bool
    budget_minutes: Positive
    pretraining_steps: PositiveInt
    teachers: list[str]
    methods: list[str]
    variants: list[str]


@checked(frozen=True, config=STRICT)
class Plan:
    emoji: str
    styles: Styles
    vocabulary: PositiveInt
    epochs: Positive
    seeds: list[int]
    budget_minutes: Positive
    sweep: Sweep
    teachers: dict[str, Teacher]
    pretraining: Pretraining
    methods: dict[str, Method]
    grid: list[Cell]
    ablations: Ablations
    mixing: Mixing
    quick: Quick
    views: dict[str, CropsView] = field(default_factory=dict)

    def made_quick(self) -> "Plan":
        """The same plan, shortened as its `quick` says."""
        q = self.quick
        chosen = [Cell(_kept(c.methods, q.methods), _kept(c.teachers, q.teachers)) for c in self.grid]
        variants = {name: self.ablations.variants[name] for name in q.variants}
        needed = " ".join(change for variant in variants.values() for change in variant.set)
        return replace(
            self,
            epochs=q.epochs,
            seeds=q.seeds,
            budget_minutes=q.budget_minutes,
            sweep=self.sweep if q.sweep else replace(self.sweep, rates=[]),
            teachers={name: self.teachers[name] for name in q.teachers},
            pretraining=replace(self.pretraining, steps=q.pretraining_steps),
            methods={name: self.methods[name] for name in q.methods},
            grid=[cell for cell in chosen if cell.methods and (cell.teachers or not self._reads_rows(cell))],
            ablations=replace(self.ablations, seeds=q.seeds, variants=variants),
            views={name: view for name, view in self.views.items() if f"$caches/{name}" in needed},
        )

    def without(self, teachers: Sequence[str]) -> "Plan":
        """The same plan without teachers that cannot be had; what needs them goes with them."""
        left = [replace(cell, teachers=[t for t in cell.teachers if t not in teachers]) for cell in self.grid]
        variants = {
            name: variant
            for name, variant in self.ablations.variants.items()
            if not any(f"/{teacher}" in change for teacher in teachers for change in variant.set)
            and self.teacher_of(name) not in teachers
        }
        return replace(
            self,
            teachers={name: teacher for name, teacher in self.teachers.items() if name not in teachers},
            grid=[cell for cell in left if cell.teachers or not self._reads_rows(cell)],
            ablations=replace(self.ablations, variants=variants),
            views={name: view for name, view in self.views.items() if view.teacher not in teachers},
        )

    def experiments(self) -> "list[Experiment]":
        """Every run, those of the grid first."""
        found = [
            Experiment(method, teacher, None, seed)
            for cell in self.grid
            for method in cell.methods
            for teacher in (cell.teachers if self.methods[method].third else [None])
            for seed in cell.seeds or self.seeds
        ]
        for name, variant in self.ablations.variants.items():
            found += [Experiment(variant.method, self.teacher_of(name), name, seed) for seed in self.ablations.seeds]
        return list(dict.fromkeys(found))

    def teacher_of(self, name: str) -> str | None:
        """The teacher of an ablation."""
        variant = self.ablations.variants[name]
        return (variant.teacher or self.ablations.teacher) if self.methods[variant.method].third else None

    def pretraining_of(self, name: str) -> Pretraining:
        """How a teacher is pretrained here."""
        one, how = self.teachers[name], self.pretraining
        return replace(how, model=one.model or how.model, image_size=one.image_size or how.image_size)

    def trials(self) -> "list[Experiment]":
        """The runs of the sweep: each method with the first of its teachers, at every rate."""
        first: dict[str, Experiment] = {}
        for one in self.experiments():
            if one.variant is None:
                first.setdefault(one.method, replace(one, seed=self.sweep.seed))
        return [replace(one, rate=rate) for one in first.values() for rate in self.sweep.rates]

    def changes(self, one: "Experiment") -> list[str]:
        """What an experiment changes in its base config, as on the command line; folders as $names."""
        changes = [f"seed={one.seed}", f"duration={{epochs: {self.sweep.epochs if one.rate else self.epochs}}}"]
        if one.teacher is not None:
            changes.append(f"towers.third.path=$caches/{one.teacher}")
        changes += self.methods[one.method].set
        if one.variant is not None:
            changes += self.ablations.variants[one.variant].set
        return changes

    def _reads_rows(self, cell: Cell) -> bool:
        return any(self.methods[method].third for method in cell.methods)


@dataclass(frozen=True)
class Experiment:
    """One run. `rate`: the learning rate, in the runs of a sweep; all others take the one that was chosen."""

    method: str
    teacher: str | None
    variant: str | None
    seed: int
    rate: float | None = None

    @property
    def group(self) -> str:
        """The name that it shares with its other seeds: METHOD[-TEACHER][-VARIANT]."""
        return "-".join(part for part in (self.method, self.teacher, self.variant) if part)

    @property
    def name(self) -> str:
        """A name for its folder and its records."""
        if self.rate is not None:
            return f"sweep-{self.group}-lr{self.rate:g}"
        return f"{self.group}-seed{self.seed}"


def load_plan(path: Path) -> Plan:
    """Return the checked plan of a YAML file. Raises BadPlan."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadPlan(f"{path}: cannot be read as YAML: {error}") from error
    return parse_plan(tree, str(path))


def parse_plan(tree: Mapping[str, Any], source: str = "plan") -> Plan:
    """Return the checked plan of a plain tree. Raises BadPlan."""
    plan = parse_as(Plan, tree, BadPlan, f"{source} is not a valid plan")
    _check(plan, source)
    return plan


def _check(plan: Plan, source: str) -> None:
    def known(key: str, names: Sequence[str], among: Mapping[str, object]) -> None:
        if unknown := [name for name in names if name not in among]:
            raise BadPlan(f"{source}: {key}: {unknown} are unknown; known are {sorted(among)}")

    for number, cell in enumerate(plan.grid):
        known(f"grid.{number}.methods", cell.methods, plan.methods)
        known(f"grid.{number}.teachers", cell.teachers, plan.teachers)
        if any(plan.methods[method].third for method in cell.methods) != bool(cell.teachers):
            raise BadPlan(f"{source}: grid.{number}: methods with a third tower need teachers, others take none")
    for name, teacher in plan.teachers.items():
        if (teacher.pretrain is None) == (teacher.package is None) or (teacher.package and not teacher.backbone):
            raise BadPlan(f"{source}: teachers.{name}: give either pretrain, or a package with its backbone")
        if teacher.model and teacher.package:
            raise BadPlan(
                f"{source}: teachers.{name}.model: a package comes with its backbone; give pretrain, or drop it"
            )
    for name, view in plan.views.items():
        known(f"views.{name}.teacher", [view.teacher], plan.teachers)
    for name, variant in plan.ablations.variants.items():
        known(f"ablations.variants.{name}.method", [variant.method], plan.methods)
        known(f"ablations.variants.{name}.teacher", [variant.teacher] if variant.teacher else [], plan.teachers)
    known("ablations.teacher", [plan.ablations.teacher], plan.teachers)
    known("mixing.method", [plan.mixing.method], plan.methods)
    known("quick.teachers", plan.quick.teachers, plan.teachers)
    known("quick.methods", plan.quick.methods, plan.methods)
    known("quick.variants", plan.quick.variants, plan.ablations.variants)
    wanted = filter(None, map(plan.teacher_of, plan.quick.variants))
    known("quick.variants: teachers", list(wanted), dict.fromkeys(plan.quick.teachers))
    styles = [*plan.styles.contrastive, *plan.styles.teacher, *plan.styles.shift]
    if len(set(styles)) < len(styles):
        raise BadPlan(f"{source}: styles: one style serves twice in {styles}; they must be apart")


def _kept(names: Sequence[str], among: Sequence[str]) -> list[str]:
    return [name for name in names if name in among]
