"""From a YAML file to a checked config: its base, one of its variants, and overrides from the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from threetowers.cache.schema import parse_as
from threetowers.trainer.config.checks import ConfigError, check_config
from threetowers.trainer.config.schema import TrainConfig
from threetowers.trainer.config.towers import TOWER_KINDS

DURATION_UNITS = {"epochs", "samples", "steps", "percent"}


def load_config(path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> TrainConfig:
    """Return the checked config in a YAML file.

    Two keys concern the file itself. `base` names another config, relative to the file, over which the keys of this one
    are merged; a base has no base. `variants` holds named changes, of which `variant` is merged over the result.
    Mappings are merged key by key, everything else is replaced, and so are a duration and a tower of another kind. A
    tower, head, term or teacher that is null is left out. The variants of a base are not inherited.

    Args:
        path: The YAML file, as in configs/.
        overrides: Further changes, as `key.path=value` with a YAML value that replaces what was there.
        variant: A name under the file's `variants`; None: the config as it stands.

    Returns:
        The config, with all defaults filled in.

    Raises:
        ConfigError: The file cannot be read, the variant is unknown, a key is unknown or has a wrong type, a name
            refers to nothing, or the combination cannot be run.

    >>> config = load_config("configs/emoji/3t.yaml", ["optim.lr=3e-4"], variant="l2")
    >>> config.optim.lr, config.terms["image-third"].kind
    (0.0003, 'l2')
    """
    path = Path(path)
    tree = _read(path)
    base = tree.pop("base", None)
    variants = _check_variants(path, tree.pop("variants", {}))
    if variant is not None and variant not in variants:
        known = ", ".join(variants) or "none"
        raise ConfigError(f"{path}: unknown variant {variant!r}; its variants are: {known}")
    if base is not None:
        tree = _merge(_read_base(path, base), tree)
    if variant is not None:
        tree = _merge(tree, variants[variant])
    for override in overrides:
        _override(tree, override)
    return parse(tree, source=str(path))


def parse(tree: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """Return the checked config in a plain tree of dicts, without `base` and `variants`.

    Args:
        tree: Keys and values, as YAML gives them. A tower, head, term or teacher that is None is left out.
        source: Where the tree comes from, for messages.

    Raises:
        ConfigError: As in `load_config`.
    """
    tree = dict(tree)
    for key in ("towers", "heads", "terms"):
        if key in tree:
            tree[key] = _without_null(tree[key])
    if isinstance(tree.get("terms"), dict):
        tree["terms"] = {name: _without_null_teachers(term) for name, term in tree["terms"].items()}
    config = parse_as(TrainConfig, tree, ConfigError, f"{source} is not a valid config")
    check_config(config, source)
    return config


def dump(config: TrainConfig) -> dict[str, Any]:
    """Return the plain tree that `parse` turns into an equal config."""
    tree: dict[str, Any] = TypeAdapter(TrainConfig).dump_python(config, mode="json")
    return tree


def _without_null(entries: Any) -> Any:
    """Return named entries without those that are null; what is no mapping, as it is."""
    return (
        {name: entry for name, entry in entries.items() if entry is not None} if isinstance(entries, dict) else entries
    )


def _without_null_teachers(term: Any) -> Any:
    if not isinstance(term, dict) or "teachers" not in term:
        return term
    return term | {"teachers": _without_null(term["teachers"])}


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def _read_base(path: Path, base: Any) -> dict[str, Any]:
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of a config, relative to this file, found {base!r}")
    tree = _read(path.parent / base)
    if "base" in tree:
        raise ConfigError(
            f"{path}: base: {base} itself has the base {tree['base']!r}, but a base may not have one; "
            "choose a base without one and repeat the keys that are missing"
        )
    tree.pop("variants", None)
    return tree


def _check_variants(path: Path, variants: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(variants, dict):
        raise ConfigError(f"{path}: variants: expected a mapping from names to changes, found {variants!r}")
    for name, changes in variants.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: variants: expected a text as the name of a variant, found {name!r}; quote it")
        if not isinstance(changes, dict):
            raise ConfigError(f"{path}: variants.{name}: expected a mapping of keys, found {changes!r}")
    return variants


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with the keys of both; where both have a key, that of `above` counts."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _is_another_choice(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _is_another_choice(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether keys of both would contradict each other: durations in two units, or towers of two kinds."""
    if above and above.keys() <= DURATION_UNITS:
        return True
    kinds = {below.get("kind"), above.get("kind")}
    return len(kinds) == 2 and kinds <= TOWER_KINDS


def _override(tree: dict[str, Any], override: str) -> None:
    path, sign, value = override.partition("=")
    keys = path.split(".")
    if not sign or not all(keys):
        raise ConfigError(f"override {override!r}: expected key.path=value, as in optim.lr=3e-4")
    node = tree
    for key in keys[:-1]:
        below = node.get(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {key} holds a value, not further keys")
        node[key] = dict(below)  # a copy: YAML aliases are one object
        node = node[key]
    try:
        node[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
