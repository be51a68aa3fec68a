"""The folder of a run: everything that resuming, evaluating and reading about it needs, in one place.

config.yaml       the resolved config          deepspeed.json   generated from it
tokenizer.model   a copy                       cache_manifests.json   what the caches promised, by tower
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
from pydantic import TypeAdapter, ValidationError

from threetowers.cache.format.manifest import Manifest, ManifestError, incompatibilities
from threetowers.trainer.atomic import replace_text
from threetowers.trainer.config import ConfigChange, ConfigError, TrainConfig, differences, dump, load

# What a resumed run may change: none of it changes what is computed, beyond rounding.
CHANGEABLE = (
    *(
        "output_dir",
        "data.workers",
        "data.index_dir",
        "engine.zero_stage",
        "engine.micro_batch_size",
        "engine.activation_checkpointing",
    ),
    *("engine.on_nonfinite", "engine.nonfinite_limit", "engine.deepspeed_extra.zero_optimization"),
    *("log", "checkpoint", "evaluate"),
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.model"

    @property
    def manifests(self) -> Path:
        return self.path / "cache_manifests.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    def check(self, run: TrainConfig) -> list[ConfigChange]:
        """Return in which keys, of those that may change, the folder's run was configured otherwise.

        Raises ConfigError, with the differences, if it differs in others.
        """
        if not self.config.exists():
            return []
        found = differences(load(self.config), run)
        changed = [d for d in found if not _changeable(d.key)]
        if changed:
            lines = "\n".join(f"  {d}" for d in changed)
            raise ConfigError(
                f"{self.path} holds a run with another config:\n{lines}\n"
                "choose another `out`, go back to that config to resume it, or remove the folder"
            )
        return found

    def check_manifests(self, manifests: Mapping[str, Manifest]) -> None:
        """Raise ContractError if the folder's run was trained on caches that promised something else."""
        if not self.manifests.exists():
            return
        for name, manifest in self.read_manifests().items():
            if name in manifests and (lines := incompatibilities(manifest, manifests[name])):
                raise ManifestError(
                    f"{self.path}: tower {name!r} is read from another cache than the one this run began with: "
                    f"{'; '.join(lines)}; restore that cache, or choose another `out`"
                )

    def read_manifests(self) -> dict[str, Manifest]:
        """What the caches of this run promised, by tower. Raises ContractError for a file that does not say it."""
        try:
            return TypeAdapter(dict[str, Manifest]).validate_json(self.manifests.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise ManifestError(
                f"{self.manifests}: damaged, or of another version: {first['msg']} at {first['loc']}; "
                "train the run again"
            ) from error

    def write_manifests(self, manifests: Mapping[str, Manifest]) -> None:
        """Write what `read_manifests` reads."""
        replace_text(self.manifests, json.dumps({name: asdict(c) for name, c in manifests.items()}, indent=2))

    def create(self, run: TrainConfig, deepspeed: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> None:
        """Write what is known before the first step. Does nothing that a resumed run would change."""
        self.path.mkdir(parents=True, exist_ok=True)
        if Path(run.data.tokenizer).resolve() != self.tokenizer.resolve():
            shutil.copyfile(run.data.tokenizer, self.tokenizer)
        replace_text(self.path / "deepspeed.json", json.dumps(deepspeed, indent=2))
        self.write_manifests(manifests)
        replace_text(self.config, yaml.safe_dump(dump(run), sort_keys=False))  # last: it marks the folder as a run's


def _changeable(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in CHANGEABLE)
