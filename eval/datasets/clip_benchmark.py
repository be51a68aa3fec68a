"""CLIP_benchmark's webdataset layout: a folder or URL that holds splits of numbered tars and what they need.

classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt  with one name or template a line
<split>/nshards.txt  <split>/0.tar  <split>/1.tar ...  with .cls members, or .txt with a caption a line
"""

import re
from dataclasses import dataclass
from functools import cached_property

from threetowers.cache.storage.storage import open_storage
from threetowers.eval.datasets.config import (
    BadDescription,
    Description,
    Neighbours,
    Pictures,
    Probe,
    Retrieval,
    Source,
    Tasks,
    ZeroShot,
)

CLASSES, TEMPLATES, KIND = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
KINDS = ("classification", "retrieval")


@dataclass(frozen=True)
class Layout:
    """A folder in this layout."""

    root: str

    def tars(self, split: str) -> list[str]:
        """Addresses of a split's tars. Raises BadDescription where there is no such split."""
        count = self._text(f"{split}/nshards.txt")
        if count is None or not count.strip().isdecimal() or int(count) < 1:
            raise BadDescription(
                f"{self.root}: split {split!r}: expected {split}/nshards.txt with the number of its tars, found "
                f"{'no such file' if count is None else repr(count)}"
            )
        return [open_storage(self._address).uri(f"{split}/{number}.tar") for number in range(int(count))]

    def has(self, split: str) -> bool:
        return self._text(f"{split}/nshards.txt") is not None

    @cached_property
    def classes(self) -> list[str] | None:
        """The class names, by number."""
        return self._lines(CLASSES)

    @cached_property
    def templates(self) -> list[str] | None:
        return self._lines(TEMPLATES)

    @cached_property
    def kind(self) -> str:
        """`classification` or `retrieval`. Raises BadDescription for another."""
        kind = (self._text(KIND) or KINDS[0]).strip().lower()
        if kind not in KINDS:
            raise BadDescription(
                f"{self.root}: {KIND} says {kind!r}, expected one of {KINDS}; several labels a picture are read from "
                "a list in a .json member or from numbers in a .cls member, not from .npy"
            )
        return kind

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
            raise BadDescription(f"{self.root}: {name} is not UTF-8: {error}") from error

    def _lines(self, name: str) -> list[str] | None:
        text = self._text(name)
        return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]


def described(root: str) -> Source:
    """Return the description that a folder in this layout gives of itself."""
    layout = Layout(root)
    name = root.rstrip("/").rpartition("/")[2]
    if layout.kind == "retrieval":
        return Source(root, Description(name=name, root=root, split="test", tasks=Tasks(retrieval=Retrieval())))
    learn = Pictures(split="train") if layout.has("train") else None
    tasks = Tasks(
        zeroshot=ZeroShot() if layout.templates else None,
        knn=Neighbours() if learn else None,
        probe=Probe() if learn else None,
    )
    return Source(root, Description(name=name, root=root, split="test", learn=learn, tasks=tasks))
