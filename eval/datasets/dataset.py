"""A described data set, opened: its pictures, with their labels as class numbers; what is wrong is said at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash
import yaml

from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.sample import BadSample, read_annotation, read_image
from threetowers.cache.webdataset.tar_index import TarIndex, expand, index_tar
from threetowers.eval.datasets.clip_benchmark import Layout, described
from threetowers.eval.datasets.config import BadDescription, Pictures, Shift, Source, parse_description
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Picture
from threetowers.eval.datasets.prompts import PromptError, class_names, prompt_templates
from threetowers.eval.metrics.classification import Ints, label_matrix

LEARNING = ("fewshot", "probe", "knn", "ood")


@dataclass(frozen=True)
class Part:
    """Some pictures of a set. `data` is all of their tars, which are embedded together; `rows` are the part's own."""

    data: EvaluationSet
    rows: Ints
    labels_NL: Ints  # of the rows, as numbers of the set's classes (see `label_matrix`)
    told_apart: Ints  # the classes a picture of this part may be of
    left_out: Mapping[str, int]  # how many, by reason
    unit_N: Ints | None = None  # equal for pictures that are drawn together in a bootstrap; None: each by itself

    @property
    def label_N(self) -> Ints:
        """One label each. Raises ValueError where a picture has several."""
        if self.labels_NL.shape[1] > 1:
            raise ValueError("probes and neighbours need one label a picture; some have several")
        label_N: Ints = self.labels_NL[:, 0]
        return label_N

    def pictures(self) -> list[Picture]:
        return [self.data.pictures[row] for row in self.rows]


@dataclass(frozen=True)
class OpenSet:
    """A described data set, with the parts that one task reads."""

    source: Source
    test: Part
    names: list[str]  # of the classes
    templates: list[str]
    learn: Part | None = None
    shifted: Mapping[str, Part] = field(default_factory=dict)
    outliers: Mapping[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class _Classes:
    """Every class of a part: the key that its labels carry, and its name."""

    keys: list[str]
    names: list[str]


class Reader:
    """Reads the pictures of tars, those that several sets or parts share once."""

    def __init__(self) -> None:
        self._read: dict[tuple[bool, tuple[str, ...]], EvaluationSet] = {}

    def __call__(self, patterns: Sequence[str], caption_per_line: bool = False) -> EvaluationSet:
        tars = tuple(expand(patterns))
        key = caption_per_line, tars
        if key not in self._read:
            self._read[key] = read_pictures([index_tar(tar) for tar in tars], caption_per_line=caption_per_line)
        return self._read[key]


def load_description(path: str | Path) -> Source:
    """Return the described set: of a YAML file, or of a folder or URL in CLIP_benchmark's layout.

    Such a folder serves zero-shot classification, or retrieval if its `dataset_type.txt` says so; and probes and
    neighbours if it has a `train` split. Raises BadDescription.
    """
    if is_url(path) or Path(path).is_dir():
        return described(str(path))
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadDescription(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise BadDescription(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return parse_description(tree, str(path))


def open_set(source: Source, task: str, settings: object, read: Reader | None = None) -> OpenSet:
    """Open what a task reads of a described set. All that can be wrong with it is found here.

    Raises BadDescription for classes, prompts or a subset that do not fit, for a label that is no class, and for a part
    without pictures; BadTar and PlaceError for tars.
    """
    try:
        return _Opening(source, read or Reader()).opened(task, settings)
    except PromptError as error:
        raise BadDescription(f"{source.path}: {error}") from error


def read_pictures(
    tars: Sequence[TarIndex], max_pixels: int = 50_000_000, caption_per_line: bool = False
) -> EvaluationSet:
    """Return every picture of the tars with its captions, if it has any, and its fields.

    Captions and fields are those of `read_annotation`. Pictures that cannot be read are listed in `skipped`.
    """
    pictures, skipped = [], []
    for number, tar in enumerate(tars):
        for ordinal in range(len(tar.samples)):
            try:
                annotation = read_annotation(tar, ordinal, caption_per_line=caption_per_line, captions_required=False)
                read_image(tar, ordinal, max_pixels)
            except BadSample as error:
                skipped.append(str(error))
                continue
            key = tar.samples[ordinal].key
            group = f"{tar.location}:{ordinal}"
            pictures.append(Picture(number, ordinal, key, group, "all", annotation.captions, annotation.fields))
    return EvaluationSet(list(tars), pictures, skipped)


class _Opening:
    """One set being opened."""

    def __init__(self, source: Source, read: Reader) -> None:
        self.source, self.own, self.read = source, source.description, read

    def opened(self, task: str, settings: object) -> OpenSet:
        own, learns = self.own, task in LEARNING
        classifies = learns or task == "zeroshot" or (isinstance(settings, Shift) and settings.of == "zeroshot")
        if learns and own.learn is None:
            self.refuse(f"{task} needs pictures to learn from; say where they are under learn")
        for needs, key, parts in (("shift", "shifted", own.shifted), ("ood", "outliers", own.outliers)):
            if task == needs and not parts:
                self.refuse(f"{task} needs at least one set under {key}")
        of_set = self.source.part(None)
        learn = {"learn": self.source.part(own.learn)} if learns else {}
        shifted = {name: self.source.part(part) for name, part in own.shifted.items()} if task == "shift" else {}
        outside = {name: self.source.part(part) for name, part in own.outliers.items()} if task == "ood" else {}
        outliers = {name: self.unlabelled(part, f"outliers.{name}") for name, part in outside.items()}
        if not classifies:
            versions = {name: self.unlabelled(part, f"shifted.{name}") for name, part in shifted.items()}
            return OpenSet(self.source, self.unlabelled(of_set, "set"), [], [], shifted=versions)
        classes = self.classes(of_set, [of_set, *learn.values(), *shifted.values()])
        kept = self.subset(classes)
        number = {classes.keys[i]: new for new, i in enumerate(kept)}
        opened = {
            what: self.labelled(part, what, classes, number)
            for what, part in {"set": of_set, **learn, **{f"shifted.{name}": p for name, p in shifted.items()}}.items()
        }
        return OpenSet(
            self.source,
            opened["set"],
            [classes.names[i] for i in kept],
            self.templates(of_set, required=not learns) if task not in ("fewshot", "probe", "knn") else [],
            learn=opened.get("learn"),
            shifted={name: opened[f"shifted.{name}"] for name in shifted},
            outliers=outliers,
        )

    def refuse(self, message: str) -> None:
        raise BadDescription(f"{self.source.path}: {message}")

    def data(self, part: Pictures) -> EvaluationSet:
        tars = part.tars
        if part.root is not None:
            tars = Layout(part.root).tars(part.split or "test")
        try:
            # CLIP_benchmark's folders hold several captions in a .txt member, one a line.
            return self.read(tars, self.own.caption_per_line or part.root is not None)
        except ValueError as error:
            raise BadDescription(f"{self.source.path}: {error}") from error

    def filtered(self, part: Pictures, what: str) -> tuple[EvaluationSet, list[int]]:
        """The part's pictures: all of its tars, and the rows that pass `where`."""
        data = self.data(part)
        where = {
            name: {wanted} if isinstance(wanted, str) else set(wanted) for name, wanted in part.where.items() if wanted
        }
        rows = []
        for row, picture in enumerate(data.pictures):
            if missing := sorted(where.keys() - picture.fields.keys()):
                self.refuse(
                    f"{what}: where: sample {picture.key!r} of {data.tars[picture.tar].name} has no field "
                    f"{missing[0]!r}, only {sorted(picture.fields)}"
                )
            if all(str(picture.fields[name]) in wanted for name, wanted in where.items()):
                rows.append(row)
        if not rows:
            reason = f"; the first of {len(data.skipped)} problems: {data.skipped[0]}" if data.skipped else ""
            self.refuse(f"{what}: none of {len(data.pictures)} pictures is left (where: {part.where or 'all'}){reason}")
        return data, rows

    def unlabelled(self, part: Pictures, what: str) -> Part:
        data, rows = self.filtered(part, what)
        labels_NL = np.full((len(rows), 1), -1, np.int64)
        return Part(data, np.array(rows), labels_NL, np.empty(0, np.int64), {"unreadable": len(data.skipped)})

    def values(self, picture: Picture, part: Pictures, what: str) -> list[str]:
        """The labels of a picture as they stand in its sample."""
        name = part.label or "cls"
        if name not in picture.fields:
            member = f"no field {name!r} in its .json member" if part.label else "no .cls member"
            self.refuse(
                f"{what}: sample {picture.key!r} has {member} (found {sorted(picture.fields)}); name the JSON field "
                "that holds the class under label"
            )
        value = picture.fields[name]
        return [str(v) for v in (value if isinstance(value, list) else [value])]

    def classes(self, part: Pictures, labelled: Sequence[Pictures]) -> _Classes:
        """Every class of a part by what its labels are: the value of a field, or a number."""
        given = part.classes
        if given is None and part.root is not None:
            given = Layout(part.root).classes
        if isinstance(given, str):
            given = class_names(given)
        if isinstance(given, dict):
            return _Classes(list(given), list(given.values()))
        if given is not None:
            return _Classes(list(given) if part.label else [str(n) for n in range(len(given))], list(given))
        if part.label is None:
            self.refuse("classes: labels are numbers (.cls), so their names are needed: a list, or classnames.txt")
        found: set[str] = set()
        for one in labelled:
            data, rows = self.filtered(one, "set")
            found |= {value for row in rows for value in self.values(data.pictures[row], one, "set")}
        return _Classes(sorted(found), sorted(found))

    def subset(self, classes: _Classes) -> list[int]:
        if self.own.subset is None:
            return list(range(len(classes.keys)))
        wanted, pairs = set(self.own.subset), list(zip(classes.keys, classes.names, strict=True))
        if unknown := sorted(wanted - set(classes.keys) - set(classes.names)):
            self.refuse(f"subset: {unknown[:3]} are none of the {len(pairs)} classes {classes.names[:5]} ...")
        return [number for number, pair in enumerate(pairs) if wanted & set(pair)]

    def templates(self, part: Pictures, required: bool) -> list[str]:
        given: Sequence[str] | str | None = self.own.prompts
        if given is None and part.root is not None:
            given = Layout(part.root).templates
        if given is None and not required:
            return []
        if given is None:
            self.refuse("prompts: zero-shot classification needs templates: a list, or the name of a shipped set")
        assert given is not None
        return prompt_templates(given)

    def labelled(self, part: Pictures, what: str, classes: _Classes, number: Mapping[str, int]) -> Part:
        """A part with labels as numbers of the set's classes. `number`: of those kept, by key."""
        data, rows = self.filtered(part, what)
        here = self.classes(part, [part]) if part.classes is not None or part.root is not None else classes
        to_set = self.translation(here, classes, what)
        kept, labels, outside, without = [], [], 0, 0
        for row in rows:
            picture = data.pictures[row]
            values = self.values(picture, part, what)
            if unknown := [value for value in values if value not in to_set]:
                self.refuse(
                    f"{what}: sample {picture.key!r} of {data.tars[picture.tar].name} has the label {unknown[0]!r}, "
                    f"which is none of the {len(here.keys)} classes ({here.keys[0]!r} to {here.keys[-1]!r})"
                )
            numbers = [number[to_set[value]] for value in values if to_set[value] in number]
            if numbers:
                kept.append(row)
                labels.append(numbers)
            elif values:
                outside += 1
            else:
                without += 1
        if not kept:
            self.refuse(f"{what}: none of {len(rows)} pictures has a label in the subset of {len(number)} classes")
        told_apart = np.array(sorted({number[key] for key in to_set.values() if key in number}))
        left_out = {"unreadable": len(data.skipped), "outside_subset": outside, "without_label": without}
        units = self.units([data.pictures[row] for row in kept], what)
        return Part(data, np.array(kept), label_matrix(labels, len(number)), told_apart, left_out, units)

    def units(self, pictures: Sequence[Picture], what: str) -> Ints | None:
        name = self.own.unit
        if name is None:
            return None
        if without := [picture for picture in pictures if name not in picture.fields]:
            self.refuse(f"{what}: unit: sample {without[0].key!r} has no field {name!r}: {sorted(without[0].fields)}")
        values = (json.dumps(picture.fields[name], sort_keys=True).encode() for picture in pictures)
        # Hashed, so that a unit has the same number in every part and record.
        return np.fromiter((xxhash.xxh3_64_intdigest(value) >> 1 for value in values), np.int64, len(pictures))

    def translation(self, here: _Classes, classes: _Classes, what: str) -> dict[str, str]:
        """From the keys of a part's classes to the set's, by name where the lists are not the same."""
        if here.names == classes.names or here.keys == classes.keys:
            return dict(zip(here.keys, classes.keys, strict=True))
        by_name = dict(zip(classes.names, classes.keys, strict=True))
        if unknown := [name for name in here.names if name not in by_name]:
            self.refuse(f"{what}: {unknown[:3]} are no classes of the set; they are {classes.names[:5]} ...")
        if len(by_name) < len(classes.names):
            self.refuse(f"{what}: has other classes than the set, which are told by name, but names occur twice there")
        return {key: by_name[name] for key, name in zip(here.keys, here.names, strict=True)}


def as_gallery(part: Part, group_field: str | None, max_captions: int) -> EvaluationSet:
    """The part as retrieval sees it: one gallery of the pictures that have captions, matched by a field or one by one.

    Raises ValueError for a field that a sample lacks and where no picture has a caption.
    """
    pictures = []
    for picture in part.pictures():
        if group_field is not None and group_field not in picture.fields:
            raise ValueError(
                f"group_field: sample {picture.key!r} has no field {group_field!r}, only {sorted(picture.fields)}"
            )
        if picture.captions:
            group = picture.group if group_field is None else str(picture.fields[group_field])
            pictures.append(replace(picture, group=group, captions=picture.captions[:max_captions]))
    if not pictures:
        raise ValueError(f"none of {len(part.rows)} pictures has a caption: retrieval needs .txt or .json members")
    return replace(part.data, pictures=pictures)
