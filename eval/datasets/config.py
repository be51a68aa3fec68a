"""A data set as one small YAML file: where its pictures lie, what their labels are called, which tasks it serves.

Paths in the file are relative to its folder. Unknown keys, wrong types and templates without a slot are refused with
the path of the offending key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from threetowers.cache.schema import parse_as
from threetowers.cache.storage.storage import is_url
from threetowers.eval.datasets.prompts import PromptError, prompt_templates
from threetowers.eval.metrics import linear_probe as probe
from threetowers.eval.metrics import neighbour_votes as knn
from threetowers.eval.metrics import ridge_probe as fewshot

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
STRICT = ConfigDict(extra="forbid")


class BadDescription(ValueError):
    """A description that cannot be used. The message names the file, the key, what it holds and what it may hold."""


@checked(frozen=True, config=STRICT)
class Pictures:
    """Where labelled pictures come from: tars of our own, or a folder in CLIP_benchmark's webdataset layout.

    In a part of a description (`learn`, `shifted`, `outliers`) a key that is left out is that of the set itself, and
    `where` is added to the set's, key by key.
    """

    tars: list[str] = field(default_factory=list)
    root: str | None = None
    split: str | None = None  # of a root: train, test, ...
    where: dict[str, str | list[str]] = field(default_factory=dict)  # JSON field: the values that are wanted
    label: str | None = None  # JSON field with the class, or a list of classes; None: the .cls member
    # Names in the order of the .cls numbers; or by value of the field; or open_clip:imagenet, clip_benchmark:SET.
    classes: list[str] | dict[str, str] | str | None = None


@checked(frozen=True, config=STRICT)
class ZeroShot:
    pass


@checked(frozen=True, config=STRICT)
class FewShot:
    shots: list[PositiveInt] = field(default_factory=lambda: list(fewshot.SHOTS))
    seeds: list[int] = field(default_factory=lambda: list(fewshot.SEEDS))
    l2: Positive = fewshot.L2


@checked(frozen=True, config=STRICT)
class Probe:
    penalties: list[Positive] = field(default_factory=lambda: list(probe.PENALTIES))
    seed: int = 0


@checked(frozen=True, config=STRICT)
class Neighbours:
    ks: list[PositiveInt] = field(default_factory=lambda: list(knn.NEIGHBOUR_KS))
    temperature: Positive = knn.TEMPERATURE


@checked(frozen=True, config=STRICT)
class Retrieval:
    group_field: str | None = None
    max_captions: PositiveInt = 5


@checked(frozen=True, config=STRICT)
class Shift:
    of: Literal["zeroshot", "retrieval"] = "zeroshot"
    retrieval: Retrieval = field(default_factory=Retrieval)  # where it is of retrieval


@checked(frozen=True, config=STRICT)
class Outliers:
    k: PositiveInt = 50  # neighbours of the k-NN score


Settings = ZeroShot | FewShot | Probe | Neighbours | Retrieval | Shift | Outliers


@checked(frozen=True, config=STRICT)
class Tasks:
    """The tasks a set serves, each with its settings; `{}` for the defaults."""

    retrieval: Retrieval | None = None
    zeroshot: ZeroShot | None = None
    fewshot: FewShot | None = None
    probe: Probe | None = None
    knn: Neighbours | None = None
    shift: Shift | None = None
    ood: Outliers | None = None


@checked(frozen=True, config=STRICT)
class Description(Pictures):
    """One data set. `metric` is the one that tables lead with."""

    name: str = ""  # of the set in records and tables; required
    metric: Literal["top1", "top5", "mean_per_class", "mean_average_precision"] = "top1"
    prompts: list[str] | str | None = None  # templates with a slot {c}, or the name of a shipped prompt set
    unit: str | None = None  # JSON field: pictures of one value (one thing, one scene) are no independent evidence
    caption_per_line: bool = False  # each line of a .txt member is a caption, as always below a root; else it is one
    subset: list[str] | None = None  # the classes (by name, or by value of the field) that are told apart
    learn: Pictures | None = None  # what probes, neighbours and outlier scores are fitted on
    shifted: dict[str, Pictures] = field(default_factory=dict)  # the same classes, drawn otherwise
    outliers: dict[str, Pictures] = field(default_factory=dict)  # what belongs to no class
    tasks: Tasks = field(default_factory=Tasks)


@dataclass(frozen=True)
class Source:
    """The description of a set as it was read: of a file, or of a folder in CLIP_benchmark's layout."""

    path: str
    description: Description

    def part(self, other: Pictures | None) -> Pictures:
        """The pictures of a part, with what it leaves out taken from the set."""
        own = self.description
        base = Pictures(own.tars, own.root, own.split, own.where, own.label, own.classes)
        if other is None:
            return base
        placed = bool(other.tars or other.root)
        return Pictures(
            tars=other.tars if placed else base.tars,
            root=other.root if placed else base.root,
            split=other.split or base.split,
            # Other files have other fields: the set's own filter is for its own.
            where=base.where | other.where,
            label=other.label or base.label,
            classes=other.classes if other.classes is not None or other.root else base.classes,
        )


def parse_description(tree: Mapping[str, Any], path: str) -> Source:
    """Return the checked description of a plain tree; relative paths are looked for in the folder of `path`."""
    description = parse_as(Description, tree, BadDescription, f"{path} does not describe a data set")
    description = _anchored(description, Path(path).parent)
    source = Source(path, description)
    _check(source)
    return source


def _anchored(description: Description, folder: Path) -> Description:
    def anchor(storage: str) -> str:
        return storage if is_url(storage) or Path(storage).is_absolute() else str(folder / storage)

    def placed(pictures: Pictures) -> Any:
        root = None if pictures.root is None else anchor(pictures.root)
        return replace(pictures, tars=[anchor(tar) for tar in pictures.tars], root=root)

    own: Description = placed(description)
    return replace(
        own,
        learn=own.learn and placed(own.learn),
        shifted={name: placed(part) for name, part in own.shifted.items()},
        outliers={name: placed(part) for name, part in own.outliers.items()},
    )


def _check(source: Source) -> None:
    own = source.description

    def refuse(message: str) -> None:
        raise BadDescription(f"{source.path}: {message}")

    if not own.name:
        refuse("name: expected the name of the set, found none")
    for key, part in {"": own, "learn.": own.learn, **_parts(own)}.items():
        if part is not None and part.tars and part.root:
            refuse(f"{key}tars, {key}root: give one of them")
    if not own.tars and not own.root:
        refuse("tars, root: give the tars, or the root of a folder in CLIP_benchmark's layout")
    tasks = own.tasks
    for name in ("fewshot", "probe", "knn", "ood"):
        if getattr(tasks, name) is not None and own.learn is None:
            refuse(f"tasks.{name}: needs pictures to learn from; say where they are under learn")
    if tasks.shift is not None and not own.shifted:
        refuse("tasks.shift: needs at least one set under shifted")
    if tasks.ood is not None and not own.outliers:
        refuse("tasks.ood: needs at least one set under outliers")
    if own.prompts is not None:
        try:
            prompt_templates(own.prompts)
        except PromptError as error:
            refuse(f"prompts: {error}")


def _parts(own: Description) -> dict[str, Pictures]:
    parts = {f"shifted.{name}.": part for name, part in own.shifted.items()}
    return parts | {f"outliers.{name}.": part for name, part in own.outliers.items()}
