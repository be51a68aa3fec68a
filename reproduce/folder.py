"""The folder of a reproduction: what each step leaves, which is also how it is known to be done.

data/        train.tar (contrastive), teacher.tar, splits.json, tokenizer.model
sets/        descriptions of the evaluation sets
packages/    downloaded packages, weights made of them
teachers/    folders that timm saved, or files of weights       fits/     what each teacher is worth on the data
caches/      a cache a teacher or view                          runs/     run folders of the trainer
records/     evaluation records, all runs                       finished/ one a run: what it was, took and left
rates.json   the learning rate of each method                   budget/      seconds of what is to be done, measured
"""

import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from threetowers.cache.storage.atomic import write_atomic


@dataclass(frozen=True)
class Folder:
    """Paths inside the folder of a reproduction."""

    path: Path

    def __getitem__(self, name: str) -> Path:
        return self.path / name

    def finished(self, name: str) -> Path:
        return self.path / "finished" / f"{name}.json"

    def filled(self, text: str, **more: str) -> str:
        """A text in which $caches, $teachers, $data and names in `more` are put in."""
        folders = {name: str(self.path / name) for name in ("caches", "teachers", "data")}
        return Template(text).substitute(folders, **more)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
