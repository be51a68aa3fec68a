"""Where a main tower's weights come from before its first step: timm's hub, a package, or a safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from threetowers.trainer.config import ImageTower, TextTower


def load_initial(tower: Any, config: ImageTower | TextTower, key: str) -> None:
    """Load what `config.init` names into a tower. `key` is the config's, for messages.

    A classifier is left out. Raises ValueError for weights that cannot be had or do not fit.
    """
    assert config.init is not None
    path, _, prefix = config.init.partition("#")
    if prefix or isinstance(config, TextTower):
        _load(tower, _part(_read(Path(path), key), prefix, config.init, key), config.init, key)
        return
    if config.specialize is not None:
        raise ValueError(f"{key}: {config.init!r} holds a plain {config.model}, the tower is specialized; leave it out")
    from threetowers.cache.encoders.teacher import load_teacher  # a run that reads rows of a cache needs none of it

    teacher = load_teacher(config.model, config.init, config.args.get("img_size"))
    classifier = getattr(teacher.model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {k: t for k, t in teacher.model.state_dict().items() if not k.startswith(tuple(f"{n}." for n in names))}
    _load(tower.model, state, config.init, key)


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{key}: {path} cannot be read as safetensors: {error}") from error


def _part(state: Mapping[str, Tensor], prefix: str, source: str, key: str) -> dict[str, Tensor]:
    part = {k.removeprefix(f"{prefix}."): t for k, t in state.items() if not prefix or k.startswith(f"{prefix}.")}
    if not part:
        known = sorted({".".join(name.split(".")[:2]) for name in state})
        raise ValueError(f"{key}: {source}: nothing is named {prefix}.*; known: {known}")
    return part


def _load(module: nn.Module, state: Mapping[str, Tensor], source: str, key: str) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{key}: {source} does not fit the tower: {error}") from error
