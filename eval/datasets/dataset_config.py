"""The config of a data set, as one small YAML file: where its images lie, their labels and classes, and its tasks.

Paths in the file are relative to its folder. Unknown keys, wrong types and templates without a slot are refused with
the path of the offending key.
"""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass as validated

from threetowers.cache.schema import parse_as
from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.tar_list import OnBad
from threetowers.eval.datasets.prompts import PromptError, prompt_templates
from threetowers.eval.tasks.settings import FORBID_EXTRA, TasksConfig


class DatasetError(ValueError):
    """A data set that cannot be used. The message names the file and key, what was found and what was expected."""


class UnfitForTask(DatasetError):
    """A data set on which one task cannot be done, though others may be."""


@validated(frozen=True, config=FORBID_EXTRA)
class PartConfig:
    """Where labelled images come from: tars of our own, or a folder in CLIP_benchmark's webdataset layout.

    In a part of a data set (`train`, `shifted`, `outliers`) a key that is left out is that of the data set itself, and
    `filter` is added to the data set's, key by key.

    Attributes:
        tars: Tars, globs or brace ranges.
        root: Folder or URL in CLIP_benchmark's layout.
        split: Split of a root: train, test, ...
        filter: Accepted values by JSON field; an empty list accepts all.
        label: JSON field with the class, or a list of classes; `npy` for the `npy` member, a vector with 1 for each
            label of the image and 0 for the other classes; None: the `cls` member.
        classes: Names in the order of the `cls` numbers; or names by value of the label field; or
            `open_clip:imagenet`, `clip_benchmark:SET`.
        image_member: Extension of the member that is the image of a sample, as `jpg` or `left.jpg`; None: the only
            member with the extension of an image.
    """

    tars: list[str] = field(default_factory=list)
    root: str | None = None
    split: str | None = None
    filter: dict[str, str | list[str]] = field(default_factory=dict)
    label: str | None = None
    classes: list[str] | dict[str, str] | str | None = None
    image_member: str | None = None


@validated(frozen=True, config=FORBID_EXTRA)
class DatasetConfig(PartConfig):
    """One data set.

    Attributes:
        name: Of the data set in records and tables; required in a file.
        metric: The metric that tables lead with; None: `mean_average_precision` where images have several labels,
            else `top1`. Tasks that do not compute it lead with `top1`.
        prompts: Templates with a slot `{c}`, or the name of a shipped prompt set.
        group_field: JSON field of the group of an image. Images of one group show the same thing and are drawn
            together in a bootstrap, as they are no independent evidence.
        captions: Sources of captions with their weights, as in training: `{txt: 1, json.recaption: 1}`. All captions
            of all of them count, in this order; without any, those of the first of `txt`, `json.captions` and
            `json.caption` that has some.
        caption_per_line: Whether each line of a text member is a caption, as always below a root; otherwise the
            member is one caption.
        on_bad: `error` stops at the first sample that cannot be used, `skip` leaves such samples out and counts them,
            `skip_tars` leaves out whole tars that cannot be read, too.
        subset: Classes, by name or by value of the label field, that are the candidates; None: all.
        train: The images that probes, neighbours and outlier scores are fitted on.
        shifted: Other versions of the same classes, by name.
        outliers: Images that belong to no class, by name.
        tasks: The tasks that the data set serves.
    """

    name: str = ""
    metric: Literal["top1", "top5", "mean_per_class", "mean_average_precision"] | None = None
    prompts: list[str] | str | None = None
    group_field: str | None = None
    captions: dict[str, float] = field(default_factory=dict)
    caption_per_line: bool = False
    on_bad: OnBad = "skip"
    subset: list[str] | None = None
    train: PartConfig | None = None
    shifted: dict[str, PartConfig] = field(default_factory=dict)
    outliers: dict[str, PartConfig] = field(default_factory=dict)
    tasks: TasksConfig = field(default_factory=TasksConfig)

    @property
    def test(self) -> PartConfig:
        """The images that are evaluated."""
        return PartConfig(self.tars, self.root, self.split, self.filter, self.label, self.classes, self.image_member)

    def caption_format(self, part: PartConfig) -> CaptionFormat:
        """Return where the captions of a part are."""
        return CaptionFormat(self.captions, self.caption_per_line or part.root is not None)

    def parts(self) -> dict[str, PartConfig]:
        """Return the other parts by key: `train`, `shifted.NAME`, `outliers.NAME`."""
        parts = {} if self.train is None else {"train": self.train}
        parts |= {f"shifted.{name}": part for name, part in self.shifted.items()}
        parts |= {f"outliers.{name}": part for name, part in self.outliers.items()}
        return parts

    def with_defaults(self, part: PartConfig) -> PartConfig:
        """Return a part with the keys that it leaves out taken from the data set."""
        has_files = bool(part.tars or part.root)
        return PartConfig(
            tars=part.tars if has_files else self.tars,
            root=part.root if has_files else self.root,
            split=part.split or self.split,
            filter=self.filter | part.filter,
            label=part.label or self.label,
            # A root brings its own list of classes.
            classes=part.classes if part.classes is not None or part.root else self.classes,
            image_member=part.image_member or self.image_member,
        )


def parse_dataset_config(tree: Mapping[str, Any], path: str) -> DatasetConfig:
    """Return the validated config of a plain tree.

    Args:
        tree: What the YAML file at `path` holds.
        path: Its path: relative tars and roots are relative to its folder, and errors name it.

    Raises:
        DatasetError: The tree is not the config of a data set.
    """
    config = parse_as(DatasetConfig, tree, DatasetError, f"{path} is not the config of a data set")
    config = _with_absolute_paths(config, Path(path).parent)
    try:
        _check(config)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    return config


def _with_absolute_paths(config: DatasetConfig, folder: Path) -> DatasetConfig:
    def absolute(path: str) -> str:
        return path if is_url(path) or Path(path).is_absolute() else str(folder / path)

    def anchored(part: Any) -> Any:
        root = None if part.root is None else absolute(part.root)
        return replace(part, tars=[absolute(tar) for tar in part.tars], root=root)

    own: DatasetConfig = anchored(config)
    return replace(
        own,
        train=None if own.train is None else anchored(own.train),
        shifted={name: anchored(part) for name, part in own.shifted.items()},
        outliers={name: anchored(part) for name, part in own.outliers.items()},
    )


def _check(config: DatasetConfig) -> None:
    """Raise DatasetError for keys that contradict each other, or lack what a task needs."""
    if not config.name:
        raise DatasetError("name: expected the name of the data set, found none")
    prefixed = {f"{key}.": part for key, part in config.parts().items()}
    for prefix, part in {"": config, **prefixed}.items():
        if part.tars and part.root:
            raise DatasetError(f"{prefix}tars, {prefix}root: found both, expected one of them")
    if not config.tars and not config.root:
        raise DatasetError(
            "tars, root: found neither; give the tars, or the root of a folder in CLIP_benchmark's layout"
        )
    for task in ("fewshot", "probe", "knn", "ood"):
        if getattr(config.tasks, task) is not None and config.train is None:
            raise DatasetError(f"tasks.{task}: needs training images; give them under train")
    if config.tasks.shift is not None and not config.shifted:
        raise DatasetError("tasks.shift: needs at least one part under shifted")
    if config.tasks.ood is not None and not config.outliers:
        raise DatasetError("tasks.ood: needs at least one part under outliers")
    try:
        config.caption_format(config)
    except ValueError as error:
        raise DatasetError(f"captions: {error}") from error
    if config.prompts is not None:
        try:
            prompt_templates(config.prompts)
        except PromptError as error:
            raise DatasetError(f"prompts: {error}") from error
