"""The folder of a run: everything that resuming, evaluating and reading about it needs, in one place.

config.yaml       the resolved config          deepspeed.json   generated from it
tokenizer.model   a copy, or tokenizer/        cache_manifests.json   the manifests of the caches, by tower
metrics.jsonl     one line per logged step     tensorboard/
checkpoints/      to resume from               model.safetensors, summary.json   written at the end
profile.json      a trace, if one was asked for
tracked_run.json  what trackers know the run by, and wandb/, where they are used
.lease/           who trains the run, while it is trained
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from threetowers.cache.encoders.tokenizers.names import load_kept_tokenizer, load_named_tokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.cache.format.manifest import Manifest, ManifestError, incompatibilities
from threetowers.cache.schema import parse_as
from threetowers.cache.storage.atomic import write_atomic
from threetowers.trainer.config import ConfigError, TrainConfig, dump, load_config
from threetowers.trainer.model.precision import new_run_precision, resolve_precision
from threetowers.trainer.optimizer.schedule import Schedule

logger = logging.getLogger(__name__)

# The keys that a resumed run may change: none of them changes what is computed, beyond rounding.
CHANGEABLE = (
    "output_dir",
    "data.workers",
    "data.index_dir",
    "data.caption_padding",
    "engine.zero_stage",
    "engine.micro_batch_size",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.on_nonfinite",
    "engine.nonfinite_limit",
    "engine.deepspeed_extra.zero_optimization",
    "log",
    "checkpoint",
    "evaluation",
)

# Changes of these make another model, which may begin with the weights of this one.
OTHER_MODEL = ("data.image_size", "data.context_length", "towers.")
# The keys that say how the learning rate goes on. They may change as long as the steps that were taken keep theirs.
SCHEDULE = ("duration", "optim.schedule", "optim.warmup", "optim.cooldown", "optim.lr_end")


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
    """The paths inside the folder of a run, and its files of settings.

    Attributes:
        path: The folder.
        address: Where the run is kept, if that is not this folder: messages name it.
    """

    path: Path
    address: str | None = None

    def __str__(self) -> str:
        """Return where the run is kept."""
        return self.address or str(self.path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def tokenizer_digest(self) -> Path:
        """What the tokenizer is: name, digest, size of its vocabulary, special tokens."""
        return self.path / "tokenizer_digest.json"

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

    def finished_steps(self) -> int | None:
        """Return the steps of the finished run in the folder; None where there is none."""
        if not self.summary.exists() or not self.weights.exists():
            return None
        steps: int = json.loads(self.summary.read_text())["steps"]
        return steps

    def remove_results(self) -> None:
        """Remove what only a finished run has, because this one goes on; and what writers left that were killed."""
        if self.summary.exists():
            logger.info("%s: goes on; its weights and summary are removed until it is finished again", self)
        for path in (self.summary, self.weights, *self.path.glob(".*.partial")):
            path.unlink(missing_ok=True)

    def check_schedule(self, config: TrainConfig, samples: int, checkpoint: int | None) -> None:
        """Check that the steps which the folder's run has taken keep their learning rates under this config.

        A run can be extended where that is so: it then is the run that would have been of the new duration from the
        start.

        Args:
            config: Of this launch.
            samples: Of one epoch.
            checkpoint: The steps that the run had taken at its newest checkpoint; None where there is none.

        Raises:
            ConfigError: They do not, or there are more of them than the run shall have. The message names the way on.
        """
        if not self.config.exists():
            return
        old = load_config(self.config)
        changes = [change for change in config_changes(old, config) if _is_below(change.key, SCHEDULE)]
        if not changes:
            return
        before, after = (_schedule(each, samples) for each in (old, config))
        taken = checkpoint or 0
        headline = f"{self} holds a run with another schedule:\n" + "\n".join(f"  {change}" for change in changes)
        if checkpoint is None and self.finished_steps() is not None:
            raise ConfigError(
                f"{headline}\nthe run is finished and has no checkpoint to go on from; choose another `output_dir`"
            )
        if after.total < taken:
            raise ConfigError(
                f"{headline}\n{taken} steps were taken already, and the run would now have {after.total}; choose "
                "another `output_dir`, or a longer duration"
            )
        step = before.first_difference(after, taken)
        if step is not None:
            raise ConfigError(
                f"{headline}\nof the {taken} steps that were taken, step {step + 1} had the learning rate "
                f"{before.rate(step):.4g} and would now have had {after.rate(step):.4g}; "
                f"{self._way_on(before, after, step, taken)}"
            )

    def _way_on(self, before: Schedule, after: Schedule, step: int, taken: int) -> str:
        """Return what to do about a schedule that gives a step that was taken another learning rate."""
        if before.warmup != after.warmup and step < max(before.warmup, after.warmup):
            return f"keep the warm-up: 'optim.warmup={{steps: {before.warmup}}}'"
        if "cosine" in (before.optim.schedule, after.optim.schedule):
            return (
                "a cosine is laid out over the duration with which the run began, constant and rsqrt are not: train a "
                "new run in another `output_dir`, whose towers may start from the weights of this one, by "
                f"towers.NAME.init={self}/{self.weights.name}#towers.NAME"
            )
        if before.cooldown and step >= before.total - before.cooldown:
            return (
                f"the cooldown began after step {before.total - before.cooldown}: to go on from before it, remove the "
                f"later checkpoints in {self}/{self.checkpoints.name}, if there is an earlier one"
            )
        return f"let a cooldown begin after step {taken}, and keep the rest of the schedule"

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """Return the config with what it leaves to this machine: the precision, and what files of models say.

        The precision that null stands for is that in which the folder's run began, if any.

        Raises:
            ValueError: The files of a tower of transformers, or of open_clip, cannot be read.
        """
        began = load_config(self.config).engine.precision if self.config.exists() else None
        if config.engine.precision is None and began not in (None, new_run_precision()):
            logger.info(
                "%s: goes on in %s, as it began; a new run would take %s on this machine",
                self,
                began,
                new_run_precision(),
            )
        return resolve_precision(_resolve_towers(config), began)

    def check(self, config: TrainConfig) -> list[ConfigChange]:
        """Return the changes between the folder's config and this one, all of which a resumed run may make.

        A folder without a config has none. Changes of the schedule are subject to `check_schedule`.

        Raises:
            ConfigError: Other keys differ, too. The message lists them.
        """
        if not self.config.exists():
            return []
        changes = config_changes(load_config(self.config), config)
        refused = [change for change in changes if not _is_below(change.key, CHANGEABLE + SCHEDULE)]
        if refused:
            lines = "\n".join(f"  {change}" for change in refused)
            weights = ""
            if any(change.key.startswith(OTHER_MODEL) for change in refused):
                weights = (
                    f"; to go on from its weights, choose another `output_dir` and set `init` of its towers, as in "
                    f"towers.NAME.init={self}/{self.weights.name}#towers.NAME"
                )
            raise ConfigError(
                f"{self} holds a run with another config:\n{lines}\n"
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
                    f"{self}: tower {name!r} reads another cache than the one this run began with: "
                    f"{'; '.join(lines)}; restore that cache, or choose another `output_dir`"
                )

    def read_manifests(self) -> dict[str, Manifest]:
        """Return the manifests of the caches of this run, by tower.

        Raises:
            ManifestError: The file is damaged, or of another version.
        """
        headline = f"{self}/{self.manifests.name} is damaged, or of another version"
        return parse_as(
            dict[str, Manifest], self.manifests.read_bytes(), ManifestError, headline, "train the run again"
        )

    def write_manifests(self, manifests: Mapping[str, Manifest]) -> None:
        """Write the manifests of the caches of this run, by tower."""
        trees = {name: asdict(manifest) for name, manifest in manifests.items()}
        write_atomic(self.manifests, json.dumps(trees, indent=2))

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of this run, by the name that its config has for it.

        Raises:
            MissingTokenizer: The folder has none.
            ValueError: It is damaged, or is no longer the one that the run began with.
        """
        tokenizer = load_kept_tokenizer(self.path)
        self.check_tokenizer(tokenizer)
        if self.tokenizer_digest.exists():
            tokenizer.name = str(json.loads(self.tokenizer_digest.read_text())["name"])
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Check that the folder's run began with the same tokenizer.

        Raises:
            ConfigError: It began with another one. The message names both.
        """
        if not self.tokenizer_digest.exists():
            return
        began = json.loads(self.tokenizer_digest.read_text())
        if began["digest"] != tokenizer.digest:
            raise ConfigError(
                f"{self}: found the tokenizer {tokenizer.name} (sha256 {tokenizer.digest[:12]}), expected "
                f"{began['name']} (sha256 {began['digest'][:12]}), which this run began with; restore that tokenizer, "
                "or choose another `output_dir`"
            )

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write a copy of the tokenizer, and what it is."""
        for name, content in tokenizer.files().items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        facts = {
            "name": tokenizer.name,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            **asdict(tokenizer.special),
            "versions": {package: version(package) for package in tokenizer.packages},
        }
        write_atomic(self.tokenizer_digest, json.dumps(facts, indent=2))

    def create(
        self,
        config: TrainConfig,
        deepspeed: Mapping[str, Any],
        manifests: Mapping[str, Manifest],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Write what is known before the first step; for a resumed run, write the same again.

        Args:
            config: The resolved config.
            deepspeed: The generated DeepSpeed config.
            manifests: The manifests of the caches, by tower.
            tokenizer: The run's; by default the one that the config names, if any.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if tokenizer is None and config.data.tokenizer is not None:
            tokenizer = load_named_tokenizer(config.data.tokenizer)
        if tokenizer is not None:
            self.write_tokenizer(tokenizer)
        write_atomic(self.path / "deepspeed.json", json.dumps(deepspeed, indent=2))
        self.write_manifests(manifests)
        write_atomic(self.config, yaml.safe_dump(dump(config), sort_keys=False))  # last: it marks the folder as a run's


def _resolve_towers(config: TrainConfig) -> TrainConfig:
    """Return the config with what its towers of other libraries take from the files of their models.

    A run without one imports nothing of it.
    """
    kinds = {tower.kind for tower in config.towers.values()}
    if "hf" in kinds:
        from threetowers.trainer.model.towers.hf_tower import resolve_hf_towers

        config = resolve_hf_towers(config)
    if "open_clip" in kinds:
        from threetowers.trainer.model.towers.open_clip_tower import resolve_open_clip_towers

        config = resolve_open_clip_towers(config)
    return config


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


def _is_below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _schedule(config: TrainConfig, samples: int) -> Schedule:
    steps = config.duration.in_steps(samples, config.global_batch_size)
    return Schedule.of(config.optim, steps, samples, config.global_batch_size)
