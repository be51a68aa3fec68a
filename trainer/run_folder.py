"""The folder of a run: everything that resuming, evaluating and reading about it needs, in one place.

config.yaml       the resolved config          deepspeed.json   generated from it
tokenizer.model   a copy                       cache_manifests.json   the manifests of the caches, by tower
metrics.jsonl     one line per logged step     tensorboard/
checkpoints/      to resume from               model.safetensors, summary.json   written at the end
profile.json      a trace, if one was asked for
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from threetowers.cache.format.manifest import Manifest, ManifestError, incompatibilities
from threetowers.cache.schema import parse_as
from threetowers.cache.storage.atomic import write_atomic
from threetowers.trainer.config import ConfigError, TrainConfig, dump, load_config

# The keys that a resumed run may change: none of them changes what is computed, beyond rounding.
CHANGEABLE = (
    "output_dir",
    "data.workers",
    "data.index_dir",
    "engine.zero_stage",
    "engine.micro_batch_size",
    "engine.activation_checkpointing",
    "engine.on_nonfinite",
    "engine.nonfinite_limit",
    "engine.deepspeed_extra.zero_optimization",
    "log",
    "checkpoint",
    "evaluation",
)

# Changes of these make another model, which may begin with the weights of this one.
OTHER_MODEL = ("data.image_size", "data.context_length", "towers.")


@dataclass(frozen=True)
class ConfigChange:
    """A key in which two configs differ, and its values."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True)
class RunFolder:
    """The paths inside the folder of a run, and its files of settings."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer."""
        return self.path / "tokenizer.model"

    @property
    def manifests(self) -> Path:
        """The manifests of the caches, by tower."""
        return self.path / "cache_manifests.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The trained weights; exists once the run is finished."""
        return self.path / "model.safetensors"

    @property
    def summary(self) -> Path:
        """The summary; exists once the run is finished."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """The metrics, one line of JSON per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> Path:
        """The profiler's trace."""
        return self.path / "profile.json"

    def check(self, config: TrainConfig) -> list[ConfigChange]:
        """Return the changes between the folder's config and this one, all of which a resumed run may make.

        A folder without a config has none.

        Raises:
            ConfigError: Other keys differ, too. The message lists them.
        """
        if not self.config.exists():
            return []
        changes = config_changes(load_config(self.config), config)
        refused = [change for change in changes if not _changeable(change.key)]
        if refused:
            lines = "\n".join(f"  {change}" for change in refused)
            weights = ""
            if any(change.key.startswith(OTHER_MODEL) for change in refused):
                weights = (
                    f"; to go on from its weights, choose another `output_dir` and set `init` of its towers, as in "
                    f"towers.NAME.init={self.weights}#towers.NAME"
                )
            raise ConfigError(
                f"{self.path} holds a run with another config:\n{lines}\n"
                f"choose another `output_dir`, restore that config to resume the run, or remove the folder{weights}"
            )
        return changes

    def check_manifests(self, manifests: Mapping[str, Manifest]) -> None:
        """Check that the folder's run was trained on the same caches.

        Raises:
            ManifestError: A cache has another manifest than the one the run began with.
        """
        if not self.manifests.exists():
            return
        for name, manifest in self.read_manifests().items():
            if name in manifests and (lines := incompatibilities(manifest, manifests[name])):
                raise ManifestError(
                    f"{self.path}: tower {name!r} reads another cache than the one this run began with: "
                    f"{'; '.join(lines)}; restore that cache, or choose another `output_dir`"
                )

    def read_manifests(self) -> dict[str, Manifest]:
        """Return the manifests of the caches of this run, by tower.

        Raises:
            ManifestError: The file is damaged, or of another version.
        """
        headline = f"{self.manifests} is damaged, or of another version"
        return parse_as(
            dict[str, Manifest], self.manifests.read_bytes(), ManifestError, headline, "train the run again"
        )

    def write_manifests(self, manifests: Mapping[str, Manifest]) -> None:
        """Write the manifests of the caches of this run, by tower."""
        trees = {name: asdict(manifest) for name, manifest in manifests.items()}
        write_atomic(self.manifests, json.dumps(trees, indent=2))

    def create(self, config: TrainConfig, deepspeed: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> None:
        """Write what is known before the first step; for a resumed run, write the same again.

        Args:
            config: The resolved config.
            deepspeed: The generated DeepSpeed config.
            manifests: The manifests of the caches, by tower.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if Path(config.data.tokenizer).resolve() != self.tokenizer.resolve():
            shutil.copyfile(config.data.tokenizer, self.tokenizer)
        write_atomic(self.path / "deepspeed.json", json.dumps(deepspeed, indent=2))
        self.write_manifests(manifests)
        write_atomic(self.config, yaml.safe_dump(dump(config), sort_keys=False))  # last: it marks the folder as a run's


def config_changes(old: TrainConfig, new: TrainConfig) -> list[ConfigChange]:
    """Return the keys in which two configs differ, dotted and sorted."""
    before = _leaves(dump(old))
    after = _leaves(dump(new))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [ConfigChange(key, before.get(key), after.get(key)) for key in changed]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree of mappings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _changeable(key: str) -> bool:
    return any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE)
