"""A data set opened for one task: its images, with their labels as class numbers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash
import yaml
from numpy.typing import ArrayLike

from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.groups import WITHOUT_GROUP, BadField, field_name, sample_group, value_name
from threetowers.eval.datasets.clip_benchmark import ClipBenchmarkFolder, folder_config
from threetowers.eval.datasets.dataset_config import (
    DatasetConfig,
    DatasetError,
    PartConfig,
    UnfitForTask,
    parse_dataset_config,
)
from threetowers.eval.datasets.image_set import EvalImage, ImageReader, ImageSet
from threetowers.eval.datasets.prompts import PromptError, class_names, prompt_templates
from threetowers.eval.left_out import NO_LABEL, OUTSIDE_FILTER, OUTSIDE_SUBSET
from threetowers.eval.metrics.classification import Ints, label_matrix
from threetowers.eval.tasks.settings import ShiftSettings

TASKS_WITH_TRAINING = ("fewshot", "probe", "knn", "ood")
LABEL_VECTOR = "npy"  # the label of CLIP_benchmark's multi-label sets


@dataclass(frozen=True)
class DatasetPart:
    """Some images of a data set.

    Attributes:
        data: All images of the part's tars, which are embedded together.
        rows: (n,) The part's own images, as rows of `data.images`.
        labels_NL: (n, L) Labels as numbers of the data set's classes, see `label_matrix`.
        candidate_classes: The classes among which an image of this part is classified.
        left_out: Number of images left out, by reason.
        group_N: (n,) Equal for images that are drawn together in a bootstrap; None: each is its own group.
        group_field: The field that names these groups.
        multi_label: Whether an image may have several labels, or none of the classes.
    """

    data: ImageSet
    rows: Ints
    labels_NL: Ints
    candidate_classes: Ints
    left_out: Mapping[str, int]
    group_N: Ints | None = None
    group_field: str | None = None
    multi_label: bool = False

    @property
    def notes(self) -> dict[str, int]:
        """What of the part's own images cannot be used, or is not there: how many images, by `notes/<phrase>`."""
        notes = Counter[str]()
        for image in self.images():
            notes.update(f"notes/{note}" for note in (*image.notes, *image.image_notes))
            if self.group_field is not None and field_name(image.fields, self.group_field) is None:
                notes[f"notes/{WITHOUT_GROUP}"] += 1
        return dict(sorted(notes.items()))

    @property
    def label_N(self) -> Ints:
        """(n,) The one label of each image. Raises UnfitForTask where an image may have several."""
        if self.multi_label:
            raise UnfitForTask("probes and neighbours need one label per image; here images have several")
        label_N: Ints = self.labels_NL[:, 0]
        return label_N

    def images(self) -> list[EvalImage]:
        """Return the part's own images."""
        return [self.data.images[row] for row in self.rows]

    def select(self, positions: ArrayLike) -> "DatasetPart":
        """Return the part with some of its images: their positions (m,) in `rows`, or a mask (n,)."""
        chosen = np.asarray(positions)
        group_N = None if self.group_N is None else self.group_N[chosen]
        return replace(self, rows=self.rows[chosen], labels_NL=self.labels_NL[chosen], group_N=group_N)


@dataclass(frozen=True)
class EvalDataset:
    """A data set with the parts that one task reads.

    Attributes:
        name: Name in records and tables: that of the data set, or of one gallery of it.
        config: Its config.
        test: The images that are evaluated.
        class_names: Names of the classes, by number; empty for tasks without classes.
        templates: Prompt templates with the slot `{c}`.
        train: The images that are fitted on, for tasks that fit.
        shifted: Other versions of the same classes, by name.
        outliers: Images that belong to no class, by name.
    """

    name: str
    config: DatasetConfig
    test: DatasetPart
    class_names: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    train: DatasetPart | None = None
    shifted: Mapping[str, DatasetPart] = field(default_factory=dict)
    outliers: Mapping[str, DatasetPart] = field(default_factory=dict)

    @property
    def train_part(self) -> DatasetPart:
        """The images that are fitted on. Raises UnfitForTask where there are none."""
        if self.train is None:
            raise UnfitForTask("needs training images; give them under train")
        return self.train

    @property
    def metric(self) -> str:
        """The metric that tables lead with."""
        return self.config.metric or ("mean_average_precision" if self.test.multi_label else "top1")

    def left_out(self) -> dict[str, int]:
        """Return the number of images left out by reason, those of other parts than the evaluated one by `part/`."""
        found = {reason: count for reason, count in self.test.left_out.items() if count}
        for name, part in self.parts().items():
            if part is not self.test:
                found |= {f"{name}/{reason}": count for reason, count in part.left_out.items() if count}
        return found

    def parts(self) -> dict[str, DatasetPart]:
        """Return all parts by name, the evaluated one first."""
        train = {} if self.train is None else {"train": self.train}
        return {"test": self.test, **train, **self.shifted, **self.outliers}


def load_dataset_config(path: str | Path) -> DatasetConfig:
    """Return the config of a data set: a YAML file, or a folder or URL in CLIP_benchmark's layout.

    Raises:
        DatasetError: The file cannot be read or is not a config, or the folder is not in this layout.
    """
    if is_url(path) or Path(path).is_dir():
        return folder_config(str(path))
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise DatasetError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return parse_dataset_config(tree, str(path))


def open_dataset(config: DatasetConfig, task: str, settings: object, reader: ImageReader | None = None) -> EvalDataset:
    """Return the parts of a data set that a task reads, after checking that they fit together.

    Args:
        config: The data set.
        task: The task's name.
        settings: The task's settings.
        reader: Reads images; share it among calls, so that each image is read once.

    Raises:
        UnfitForTask: The data set lacks what this task needs: training images, prompts, shifted parts, outliers.
        DatasetError: Classes, prompts or the subset do not fit, a label is not a class, a part has no images, tars
            cannot be read, or a sample cannot and `on_bad` is `error`.
    """
    try:
        return _DatasetBuilder(config, reader or ImageReader()).build(task, settings)
    except PromptError as error:
        raise DatasetError(str(error)) from error


@dataclass(frozen=True)
class _Classes:
    """The classes of a part: the value that labels hold, and the name, of each."""

    values: list[str]
    names: list[str]


class _DatasetBuilder:
    """Builds an `EvalDataset` from its config."""

    def __init__(self, config: DatasetConfig, reader: ImageReader) -> None:
        self.config = config
        self.reader = reader

    def build(self, task: str, settings: object) -> EvalDataset:
        config = self.config
        trains = task in TASKS_WITH_TRAINING
        if trains and config.train is None:
            raise UnfitForTask(f"{task} needs training images; give them under train")
        if task == "shift" and not config.shifted:
            raise UnfitForTask("shift needs at least one part under shifted")
        if task == "ood" and not config.outliers:
            raise UnfitForTask("ood needs at least one part under outliers")

        # The parts that this task reads; outliers have no labels.
        test = config.test
        outliers: dict[str, DatasetPart] = {}
        if task == "ood":
            for name, part in config.outliers.items():
                outliers[name] = self.unlabelled(config.with_defaults(part), f"outliers.{name}")
        shifted: dict[str, PartConfig] = {}
        if task == "shift":
            shifted = {name: config.with_defaults(part) for name, part in config.shifted.items()}

        classifies = trains or task == "zeroshot" or (isinstance(settings, ShiftSettings) and settings.of == "zeroshot")
        if not classifies:
            versions = {name: self.unlabelled(part, f"shifted.{name}") for name, part in shifted.items()}
            return EvalDataset(config.name, config, self.unlabelled(test, "test"), shifted=versions)

        # Classes are numbered over all parts, and only those of the subset are kept.
        train = config.with_defaults(config.train) if trains and config.train is not None else None
        labelled = [test, *shifted.values()] if train is None else [test, train, *shifted.values()]
        classes = self.classes(test, labelled)
        kept = self.subset(classes)
        number = {classes.values[old]: new for new, old in enumerate(kept)}

        needs_prompts = task in ("zeroshot", "shift")
        return EvalDataset(
            name=config.name,
            config=config,
            test=self.labelled(test, "test", classes, number),
            class_names=[classes.names[old] for old in kept],
            templates=self.templates(test, required=needs_prompts) if needs_prompts or task == "ood" else [],
            train=None if train is None else self.labelled(train, "train", classes, number),
            shifted={name: self.labelled(part, f"shifted.{name}", classes, number) for name, part in shifted.items()},
            outliers=outliers,
        )

    def data(self, part: PartConfig) -> ImageSet:
        """Return all images of a part's tars."""
        tars = part.tars
        if part.root is not None:
            tars = ClipBenchmarkFolder(part.root).tars(part.split or "test")
        try:
            return self.reader.read(
                tars,
                self.config.caption_format(part),
                image_member=part.image_member,
                on_bad=self.config.on_bad,
                label_vectors=part.label == LABEL_VECTOR,
            )
        except ValueError as error:
            raise DatasetError(str(error)) from error

    def filtered(self, part: PartConfig, key: str) -> tuple[ImageSet, list[int], Counter[str]]:
        """Return all images of a part's tars, the rows that pass its filter, and the others' number by reason."""
        data = self.data(part)
        accepted: dict[str, set[str]] = {}
        for name, values in part.filter.items():
            if values:
                accepted[name] = {values} if isinstance(values, str) else set(values)
        rows = []
        left_out = Counter(data.left_out)
        unfiltered: list[str] = []
        for row, image in enumerate(data.images):
            if missing := sorted(accepted.keys() - image.fields.keys()):
                unfiltered.append(
                    f"{key}: filter: sample {image.key!r} of {data.tars[image.tar].name} has no field {missing[0]!r}, "
                    f"only {sorted(image.fields)}"
                )
            elif all(_field_value(image, name, f"{key}: filter") in values for name, values in accepted.items()):
                rows.append(row)
            else:
                left_out[OUTSIDE_FILTER] += 1
        self.count(unfiltered, "no filter field", len(data.images), left_out)
        self.check_filter(part, key, data)
        if not rows:
            reason = f"; the first of {len(data.skipped)} problems: {data.skipped[0]}" if data.skipped else ""
            raise DatasetError(
                f"{key}: none of {len(data.images)} images is left (filter: {part.filter or 'all'}){reason}"
            )
        return data, rows, left_out

    def count(self, problems: Sequence[str], reason: str, images: int, left_out: Counter[str]) -> None:
        """Count images that lack something. Raises the first problem if all do, or if `on_bad` is `error`."""
        if problems and (len(problems) == images or self.config.on_bad == "error"):
            raise DatasetError(problems[0])
        if problems:
            left_out[reason] += len(problems)

    def check_filter(self, part: PartConfig, key: str, data: ImageSet) -> None:
        """Raise DatasetError for a value in the data set's own filter that none of its images has."""
        if key != "test":  # the other parts inherit values that may be those of the data set's images alone
            return
        for name, values in part.filter.items():
            wanted = [values] if isinstance(values, str) else values
            names = {_field_value(image, name, f"{key}: filter") for image in data.images if name in image.fields}
            there = {value for value in names if value is not None}
            if unknown := [value for value in wanted if value not in there]:
                known = sorted(there)
                raise DatasetError(
                    f"{key}: filter: {name}: no image has {unknown[0]!r}; found {known[:20]}"
                    f"{' ...' if len(known) > 20 else ''}"
                )

    def unlabelled(self, part: PartConfig, key: str) -> DatasetPart:
        """Return a part whose labels do not matter."""
        data, rows, left_out = self.filtered(part, key)
        labels_NL = np.full((len(rows), 1), -1, np.int64)
        return DatasetPart(data, np.array(rows), labels_NL, np.empty(0, np.int64), left_out)

    def label_values(self, image: EvalImage, part: PartConfig, key: str) -> list[str] | DatasetError:
        """Return the labels of an image as its sample holds them, or the error where it has none to read."""
        name = part.label or "cls"
        if image.fields.get(name) is None:
            member = f"no field {name!r} in its .json member" if part.label else "no .cls member"
            if name in image.fields:
                member = f"null as its field {name!r}"
            return DatasetError(
                f"{key}: sample {image.key!r} has {member} (found {sorted(image.fields)}); name the JSON field that "
                "holds the class under label"
            )
        value = image.fields[name]
        if name == LABEL_VECTOR:
            return [str(number) for number, is_label in enumerate(value) if is_label]
        values = value if isinstance(value, list) else [value]
        try:
            names = [value_name(one) for one in values]
        except BadField as error:
            raise DatasetError(f"{key}: label: sample {image.key!r}: field {name!r} holds {error}") from error
        return [label for label in names if label is not None]

    def classes(self, part: PartConfig, labelled: Sequence[PartConfig]) -> _Classes:
        """Return the classes of a part; where none are listed, every label value that the labelled parts hold."""
        given = part.classes
        if given is None and part.root is not None:
            given = ClipBenchmarkFolder(part.root).classes
        if isinstance(given, str):
            given = class_names(given)
        if isinstance(given, dict):
            return _Classes(list(given), list(given.values()))
        if given is not None:
            numbered = part.label in (None, LABEL_VECTOR)
            return _Classes([str(n) for n in range(len(given))] if numbered else list(given), list(given))
        if part.label in (None, LABEL_VECTOR):
            raise DatasetError(
                "classes: labels are numbers (.cls or .npy), so names are needed: give a list, or classnames.txt"
            )
        found: set[str] = set()
        for other in labelled:
            data, rows, _ = self.filtered(other, "test" if other is part else "train or shifted")
            for row in rows:
                values = self.label_values(data.images[row], other, "test")
                if not isinstance(values, DatasetError):  # `labelled` counts those
                    found.update(values)
        if not found:
            data, rows, _ = self.filtered(part, "test")
            self.labels_of(data, rows, part, "test", Counter())
        return _Classes(sorted(found), sorted(found))

    def subset(self, classes: _Classes) -> list[int]:
        """Return the numbers of the classes that are kept, in order."""
        if self.config.subset is None:
            return list(range(len(classes.values)))
        wanted = set(self.config.subset)
        if unknown := sorted(wanted - set(classes.values) - set(classes.names)):
            raise DatasetError(
                f"subset: {unknown[:3]} are none of the {len(classes.names)} classes {classes.names[:5]} ..."
            )
        pairs = zip(classes.values, classes.names, strict=True)
        return [number for number, pair in enumerate(pairs) if wanted & set(pair)]

    def templates(self, part: PartConfig, required: bool) -> list[str]:
        """Return the prompt templates; empty where there are none and none are required."""
        given: Sequence[str] | str | None = self.config.prompts
        if given is None and part.root is not None:
            given = ClipBenchmarkFolder(part.root).templates
        if given is not None:
            return prompt_templates(given)
        if required:
            raise UnfitForTask("prompts: zero-shot classification needs templates: a list, or a shipped prompt set")
        return []

    def labelled(self, part: PartConfig, key: str, classes: _Classes, number: Mapping[str, int]) -> DatasetPart:
        """Return a part with its labels as numbers of the data set's classes.

        Args:
            part: The part.
            key: Its key, for messages.
            classes: All classes of the data set.
            number: Of the classes that are kept, by label value.
        """
        data, rows, left_out = self.filtered(part, key)
        own = self.classes(part, [part]) if part.classes is not None or part.root is not None else classes
        to_dataset = self.translation(own, classes, key)

        kept: list[int] = []
        labels: list[list[int]] = []
        for row, values in self.labels_of(data, rows, part, key, left_out):
            image = data.images[row]
            if part.label == LABEL_VECTOR and len(image.fields[LABEL_VECTOR]) != len(own.values):
                raise DatasetError(
                    f"{key}: sample {image.key!r} of {data.tars[image.tar].name} has a vector of "
                    f"{len(image.fields[LABEL_VECTOR])} labels, expected one for each of {len(own.values)} classes"
                )
            if unknown := [value for value in values if value not in to_dataset]:
                raise DatasetError(
                    f"{key}: sample {image.key!r} of {data.tars[image.tar].name} has the label {unknown[0]!r}, "
                    f"which is none of the {len(own.values)} classes ({own.values[0]!r} to {own.values[-1]!r})"
                )
            numbers = [number[to_dataset[value]] for value in values if to_dataset[value] in number]
            # By a vector an image without labels is known to be of no class: it counts against each, as in
            # CLIP_benchmark. An empty list says nothing.
            if numbers or (part.label == LABEL_VECTOR and not values):
                kept.append(row)
                labels.append(numbers)
            else:
                left_out[OUTSIDE_SUBSET if values else NO_LABEL] += 1
        if not any(labels):
            raise DatasetError(f"{key}: none of {len(rows)} images has a label in the subset of {len(number)} classes")

        labels_NL = label_matrix(labels, len(number))
        return DatasetPart(
            data=data,
            rows=np.array(kept),
            labels_NL=labels_NL,
            candidate_classes=np.array(sorted({number[value] for value in to_dataset.values() if value in number})),
            left_out=left_out,
            group_N=self.groups(data, [data.images[row] for row in kept], key),
            group_field=self.config.group_field,
            multi_label=labels_NL.shape[1] > 1 or part.label == LABEL_VECTOR,
        )

    def labels_of(
        self, data: ImageSet, rows: Sequence[int], part: PartConfig, key: str, left_out: Counter[str]
    ) -> list[tuple[int, list[str]]]:
        """Return the rows that have a label to read, with it; the others are counted."""
        found: list[tuple[int, list[str]]] = []
        problems: list[str] = []
        for row in rows:
            values = self.label_values(data.images[row], part, key)
            if isinstance(values, DatasetError):
                problems.append(str(values))
            else:
                found.append((row, values))
        self.count(problems, NO_LABEL, len(rows), left_out)
        return found

    def groups(self, data: ImageSet, images: Sequence[EvalImage], key: str) -> Ints | None:
        """Return a number for the group of each image; None without a group field."""
        name = self.config.group_field
        if name is None:
            return None
        if not any(name in image.fields for image in images):
            raise DatasetError(
                f"{key}: group_field: sample {images[0].key!r} has no field {name!r}, only {sorted(images[0].fields)}; "
                "no other image has it either"
            )
        numbers = np.empty(len(images), np.int64)
        for row, image in enumerate(images):
            try:
                group = sample_group(data.tars[image.tar], image.ordinal, image.fields, name)
            except BadField as error:
                raise DatasetError(f"{key}: group_field: sample {image.key!r}: {error}") from error
            # Hashed, so that a group has the same number in every part and record.
            numbers[row] = xxhash.xxh3_64_intdigest(json.dumps(group.name).encode()) >> 1
        return numbers

    def translation(self, own: _Classes, classes: _Classes, key: str) -> dict[str, str]:
        """Return the data set's label value for each of a part's own, matched by name where the lists differ."""
        if own.names == classes.names or own.values == classes.values:
            return dict(zip(own.values, classes.values, strict=True))
        by_name = dict(zip(classes.names, classes.values, strict=True))
        if unknown := [name for name in own.names if name not in by_name]:
            raise DatasetError(
                f"{key}: {unknown[:3]} are not classes of the data set, which has {classes.names[:5]} ..."
            )
        if len(by_name) < len(classes.names):
            raise DatasetError(
                f"{key}: its classes are matched with the data set's by name, but some of those have the same name"
            )
        return {value: by_name[name] for value, name in zip(own.values, own.names, strict=True)}


def _field_value(image: EvalImage, name: str, key: str) -> str | None:
    """Return the value of a field as a name, None where there is none. Raises DatasetError for a list or an object."""
    try:
        return field_name(image.fields, name)
    except BadField as error:
        raise DatasetError(f"{key}: sample {image.key!r}: {error}") from error
