"""The weights of a tower before its first step: from timm's hub, a package, or a safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from threetowers.trainer.config import ImageTower, TextTower


def load_initial(tower: Any, config: ImageTower | TextTower, key: str) -> None:
    """Load the weights that `config.init` names into a tower, without the classifier.

    Args:
        tower: A `TimmTower` or `TextTransformer`.
        config: The tower's.
        key: Of `init` in the config, for messages.

    Raises:
        ValueError: If the weights cannot be loaded or do not fit.
    """
    assert config.init is not None
    path, _, prefix = config.init.partition("#")
    if prefix or isinstance(config, TextTower):
        state = _under_prefix(_read(Path(path), key), prefix, config.init, key)
        _load(tower, state, config.init, key)
        return
    if config.specialize is not None:
        raise ValueError(
            f"{key}: {config.init!r} holds a plain {config.model}, but the tower is specialised; leave init out"
        )
    from threetowers.cache.encoders.teacher import load_teacher  # a run that reads rows of a cache needs none of it

    teacher = load_teacher(config.model, config.init, config.args.get("img_size"))
    classifier = getattr(teacher.model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{name}." for name in names)
    state = {name: t for name, t in teacher.model.state_dict().items() if not name.startswith(prefixes)}
    _load(tower.model, state, config.init, key)


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


def _load(module: nn.Module, state: Mapping[str, Tensor], source: str, key: str) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{key}: {source} does not fit the tower: {error}") from error
