"""CLIP_benchmark's webdataset layout: a folder or URL that holds splits of numbered tars and what they need.

classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt  with one name or template a line
<split>/nshards.txt  <split>/0.tar  <split>/1.tar ...  with .cls or .npy members, or .txt with a caption a line
"""

import re
from dataclasses import dataclass
from functools import cached_property

from threetowers.cache.storage.storage import open_storage
from threetowers.eval.datasets.dataset_config import DatasetConfig, DatasetError, PartConfig
from threetowers.eval.tasks.settings import KnnSettings, ProbeSettings, RetrievalSettings, TasksConfig, ZeroShotSettings

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPE_FILE = "dataset_type.txt"
DATASET_TYPES = ("classification", "multilabel", "retrieval")


@dataclass(frozen=True)
class ClipBenchmarkFolder:
    """A folder or URL in this layout."""

    root: str

    def tars(self, split: str) -> list[str]:
        """Return the addresses of the tars of a split. Raises DatasetError where there is no such split."""
        count = self._text(f"{split}/nshards.txt")
        if count is None or not count.strip().isdecimal() or int(count) < 1:
            raise DatasetError(
                f"{self.root}: split {split!r}: expected {split}/nshards.txt with the number of its tars, found "
                f"{'no such file' if count is None else repr(count)}"
            )
        return [open_storage(self._address).uri(f"{split}/{number}.tar") for number in range(int(count))]

    def has(self, split: str) -> bool:
        """Return whether there is such a split."""
        return self._text(f"{split}/nshards.txt") is not None

    @cached_property
    def classes(self) -> list[str] | None:
        """The class names, by number; None where there is no list."""
        return self._lines(CLASSES_FILE)

    @cached_property
    def templates(self) -> list[str] | None:
        """The prompt templates; None where there is no list."""
        return self._lines(TEMPLATES_FILE)

    @cached_property
    def dataset_type(self) -> str:
        """`classification`, `multilabel` or `retrieval`. Raises DatasetError for another."""
        found = (self._text(TYPE_FILE) or DATASET_TYPES[0]).strip().lower()
        if found not in DATASET_TYPES:
            raise DatasetError(f"{self.root}: {TYPE_FILE} holds {found!r}, expected one of {DATASET_TYPES}")
        return found

    @property
    def _address(self) -> str:
        # The Hugging Face hub serves the files of a folder beside the page that shows it.
        return re.sub(r"^(https://huggingface\.co/datasets/[^/]+/[^/]+)/tree/", r"\1/resolve/", self.root)

    def _text(self, name: str) -> str | None:
        try:
            return open_storage(self._address).read(name).decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.root}: {name} is not UTF-8: {error}") from error

    def _lines(self, name: str) -> list[str] | None:
        text = self._text(name)
        return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]


def folder_config(root: str) -> DatasetConfig:
    """Return the config of a folder in this layout.

    It serves retrieval if its `dataset_type.txt` holds that, by CLIP_benchmark's protocol: every caption of an image,
    each as often as it is there. Otherwise it serves zero-shot classification, and k-NN and a linear probe if it has a
    `train` split and one label per image. Labels are in `cls` members, or in `npy` members if the type is `multilabel`.
    """
    folder = ClipBenchmarkFolder(root)
    name = root.rstrip("/").rpartition("/")[2]
    if folder.dataset_type == "retrieval":
        tasks = TasksConfig(retrieval=RetrievalSettings(max_captions=None, duplicate_captions="each"))
        return DatasetConfig(name=name, root=root, split="test", caption_per_line=True, tasks=tasks)
    multilabel = folder.dataset_type == "multilabel"
    has_train = folder.has("train")
    fits = has_train and not multilabel
    tasks = TasksConfig(
        zeroshot=ZeroShotSettings(), knn=KnnSettings() if fits else None, probe=ProbeSettings() if fits else None
    )
    return DatasetConfig(
        name=name,
        root=root,
        split="test",
        label="npy" if multilabel else None,
        caption_per_line=True,
        train=PartConfig(split="train") if has_train else None,
        tasks=tasks,
    )
