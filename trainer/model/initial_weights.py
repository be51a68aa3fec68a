"""The weights of a tower before its first step: from timm's hub, a package, or a safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from threetowers.trainer.config import ImageTower, TextTower
from threetowers.trainer.model.resampling import fit_to_tower


def load_initial(tower: Any, config: ImageTower | TextTower, key: str) -> list[str]:
    """Load the weights that `config.init` names into a tower, without the classifier.

    Weights of another image size or context length are resampled.

    Args:
        tower: A `TimmTower` or `TextTransformer`.
        config: The tower's.
        key: Of `init` in the config, for messages.

    Returns:
        Which weights were resampled, and from what to what size.

    Raises:
        ValueError: If the weights cannot be loaded or do not fit.
    """
    assert config.init is not None
    path, _, prefix = config.init.partition("#")
    if prefix or isinstance(config, TextTower):
        state = _under_prefix(_read(Path(path), key), prefix, config.init, key)
        return _load(tower, config, state, key)
    if config.specialize is not None:
        raise ValueError(
            f"{key}: {config.init!r} holds a plain {config.model}, but the tower is specialised; leave init out"
        )
    # A run that reads rows of a cache needs none of it.
    from threetowers.cache.encoders.teacher import load_teacher, read_state

    if config.init == "pretrained" or config.init.startswith("package:"):
        weights = load_teacher(config.model, config.init).model.state_dict()
    else:
        weights = dict(read_state(Path(path)))  # perhaps of a model with the tower's arguments
    classifier = tower.model.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{name}." for name in names)
    state = {f"model.{name}": t for name, t in weights.items() if not name.startswith(prefixes)}
    return _load(tower, config, state, key)


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{key}: {path} cannot be read as safetensors: {error}") from error


def _under_prefix(state: Mapping[str, Tensor], prefix: str, source: str, key: str) -> dict[str, Tensor]:
    """Return the tensors under a dotted prefix, by their names below it; all of them for no prefix."""
    if not prefix:
        return dict(state)
    part = {name.removeprefix(f"{prefix}."): t for name, t in state.items() if name.startswith(f"{prefix}.")}
    if not part:
        known = sorted({".".join(name.split(".")[:2]) for name in state})
        raise ValueError(f"{key}: {source} has no tensor named {prefix}.*; known prefixes: {known}")
    return part


def _load(tower: Any, config: ImageTower | TextTower, state: Mapping[str, Tensor], key: str) -> list[str]:
    try:
        fitting, notes = fit_to_tower(tower, config, state)
    except ValueError as error:
        raise ValueError(
            f"{key}: {config.init} does not fit the tower: {error}; change the tower to fit these weights, or choose "
            "others (only positions are resampled, where timm or open_clip does so)"
        ) from error
    tower.load_state_dict(fitting, strict=True)
    return [f"{key}: resampled {note}" for note in notes]
