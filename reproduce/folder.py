"""The folder of a reproduction; a step is done when its output is there.

data/        train.tar (contrastive), teacher.tar, splits.json, tokenizer.model
sets/        configs of the evaluation sets
packages/    downloaded packages
teachers/    models that timm saved, or files of weights; a file a run that teaches, with the temperature it learned
caches/      a cache a teacher or view; NAME-image and NAME-text of a run that teaches
fits/        how well each teacher fits the data
budget/      measured seconds of each kind of work
runs/        run folders of the trainer
records/     evaluation records of all runs
finished/    a file a run: settings, seconds and names of records
rates.json   the learning rate of each method
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
        """Return the path of a file or folder by its relative name."""
        return self.path / name

    def finished(self, name: str) -> Path:
        """Return the path of the file that marks an experiment as finished."""
        return self.path / "finished" / f"{name}.json"

    def substitute(self, text: str, **more: str) -> str:
        """Return a text with $caches, $teachers, $data and the names in `more` replaced."""
        folders = {name: str(self.path / name) for name in ("caches", "teachers", "data")}
        return Template(text).substitute(folders, **more)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
