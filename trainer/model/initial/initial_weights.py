"""The weights of a tower before its first step: from timm, a package, another run, or a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.huggingface.architecture import pixel_statistics, pretrained_state
from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.encoders.openclip.model_config import read_open_clip_config
from threetowers.cache.encoders.packaged_weights import PACKAGE
from threetowers.cache.encoders.timm_models import head_tensors
from threetowers.cache.encoders.weights_file import model_part, read_state, require_finite, split_part
from threetowers.cache.storage.storage import is_url
from threetowers.trainer.config import HfTower, ImageTower, OpenClipTower, TextTower, WeightedTower
from threetowers.trainer.model.initial.inheritance import inherited_weights
from threetowers.trainer.model.initial.resampling import fit_to_tower

COUNTER = "num_batches_tracked"
# What `init` of a tower may be, by the tower's kind; null, for random weights, in any.
BEGINNINGS = {
    "timm": ("pretrained", "package:NAME", "timm:NAME[:WEIGHTS]", "run:FOLDER", "a file"),
    "text": ("run:FOLDER", "a file"),
    "open_clip": ("pretrained", "open_clip:NAME:WEIGHTS", "run:FOLDER", "a file"),
    "hf": ("pretrained", "package:NAME", "run:FOLDER", "a file"),
}
TIMM, RUN = "timm:", "run:"
TOWERS = "towers."  # begins the part of a run that is a tower


def load_initial(tower: Any, config: WeightedTower, key: str) -> list[str]:
    """Load the weights that `config.init` names into a tower, without the classifier.

    Weights of another image size or context length are resampled; those of a larger tower are cut down where
    `config.inherit` says so.

    Args:
        tower: A tower with weights.
        config: The tower's.
        key: Of `init` in the config, for messages.

    Returns:
        What was inherited of a larger tower, and which weights were resampled from what to what size.

    Raises:
        ValueError: If the weights cannot be loaded or do not fit.
    """
    assert config.init is not None
    try:
        state, inherited = _weights(tower, config, config.init)
        resampled = _load(tower, config, state, config.init)
        require_finite(tower, config.init)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return [*(f"{key}: inherited {note}" for note in inherited), *(f"{key}: resampled {note}" for note in resampled)]


def _weights(tower: Any, config: WeightedTower, init: str) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return the weights of a tower under its own names, and what of a larger tower they are."""
    if isinstance(config, TextTower):
        _require_text(init)
    _require_known(config, init)
    if isinstance(config, ImageTower | TextTower) and config.inherit is not None:
        return _from_larger(tower, config, init)
    if init.startswith(RUN):
        return _run_tower(config, init).state_dict(), []
    if isinstance(config, OpenClipTower):
        from threetowers.trainer.model.initial.open_clip_weights import open_clip_weights  # imports torchvision

        return open_clip_weights(tower, config, init), []
    if isinstance(config, HfTower):
        return _hf_weights(tower, config, init), []
    if isinstance(config, TextTower):
        return _from_file(tower, init), []
    weights = _image_weights(tower.model, config, init)
    head: set[str] = set()
    if config.specialize is None and weights.keys() - tower.model.state_dict().keys():
        head = head_tensors(config.model, **config.args)
    return {f"model.{name}": tensor for name, tensor in weights.items() if name not in head}, []


def _hf_weights(tower: Any, config: HfTower, init: str) -> dict[str, Tensor]:
    """Return the weights for a model of transformers, without a pooler that the tower has left out."""
    statistics: dict[str, Tensor] = {}
    if init == "pretrained" or init.startswith(PACKAGE):
        source = init if config.model is None or init.startswith(PACKAGE) else config.model
        state = pretrained_state(source, config.of)
        if config.of == "image":
            values = zip(("mean", "std"), pixel_statistics(source), strict=True)
            statistics = {name: torch.tensor(three).view(1, 3, 1, 1) for name, three in values}
    else:
        state = _from_file(tower.model, init)
    own = tower.model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if name in own or not name.startswith("pooler.")}
    return {**{f"model.{name}": tensor for name, tensor in kept.items()}, **statistics}


def _from_larger(tower: Any, config: ImageTower | TextTower, init: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights that a tower inherits from a larger one, and what they are."""
    source: Any
    if init.startswith(RUN):
        source = _run_tower(config, init)
    else:
        assert isinstance(config, ImageTower)  # the config's checks let a text tower inherit from runs alone
        source = _timm_model(config, init)
        source.reset_classifier(0)
    try:
        if isinstance(config, TextTower):
            return inherited_weights(tower, source)
        weights, notes = inherited_weights(tower.model, source.model if init.startswith(RUN) else source)
    except ValueError as error:
        raise ValueError(f"{init} cannot be inherited from: {error}") from error
    return {f"model.{name}": tensor for name, tensor in weights.items()}, notes


def _require_known(config: WeightedTower, init: str) -> None:
    """Raise ValueError for a kind of encoder that a tower cannot begin with."""
    kind, colon, _ = init.partition(":")
    *others, last = ("null", *BEGINNINGS[config.kind])
    known = {source.partition(":")[0] for source in others if ":" in source}
    if colon and kind not in known and not split_part(init)[0].exists():
        raise ValueError(
            f"{init!r}: for a tower of kind {config.kind} expected {', '.join(others)} or {last}, found the kind "
            f"{kind!r}"
        )


def _require_text(init: str) -> None:
    """Raise ValueError for weights of images, which no text tower begins with."""
    if init.startswith(TIMM):
        raise ValueError(f"{init!r} is a model of images; a text tower begins with the tower of a run, or a file")


def _image_weights(model: Any, config: ImageTower, init: str) -> dict[str, Tensor]:
    """Return the weights for a timm model, perhaps a specialised one, under its own names."""
    if not (init.startswith(TIMM) or init == "pretrained" or init.startswith("package:")):
        return _from_file(model, init)
    if config.specialize is not None:
        raise ValueError(f"{init!r} holds a plain {config.model}, but the tower is specialised; leave init out")
    return dict(_timm_model(config, init).state_dict())


def _timm_model(config: ImageTower, init: str) -> nn.Module:
    """Return the model of timm that `init` names, with its weights and classifier."""
    from threetowers.cache.encoders.timm_encoder import load_timm_model  # a run that reads rows of a cache needs none

    if not init.startswith(TIMM):
        return load_timm_model(config.model, init)[0]
    name = EncoderName.parse(init)
    if name.size is not None:
        raise ValueError(f"{init!r}: leave out @{name.size}: weights are resampled to data.image_size")
    return load_timm_model(name.name, name.weights or "pretrained")[0]


def _run_tower(config: WeightedTower, init: str) -> nn.Module:
    """Return the tower of a run that `run:FOLDER[#towers.NAME]` names: the one of the same kind, if it is alone."""
    from threetowers.trainer.export.trained_model import load_model  # which builds towers, and so imports this

    folder, part = run_and_part(init.removeprefix(RUN))
    trained = load_model(folder, precision="float32")
    towers = trained.config.towers.items()
    of_kind = [name for name, tower in towers if (tower.kind, tower.of) == (config.kind, config.of)]
    fitting = [name for name in of_kind if not part or part == TOWERS + name]
    if len(fitting) != 1:
        known = ", ".join(f"{RUN}{folder}#{TOWERS}{name}" for name in of_kind)
        wanted = f"{config.kind!r}" + (f" of {config.of}" if isinstance(config, OpenClipTower) else "")
        raise ValueError(f"{init!r}: expected one tower of the kind {wanted}, found {known or 'none'}")
    source = trained.config.towers[fitting[0]]
    if isinstance(config, OpenClipTower) and isinstance(source, OpenClipTower):
        from threetowers.trainer.model.initial.open_clip_weights import require_same_architecture

        require_same_architecture(config, read_open_clip_config(source.model, source.args))
    return trained.model.towers[fitting[0]]


def run_and_part(source: str) -> tuple[str | Path, str]:
    """Return folder or URL, and part, of `FOLDER[#PART]`."""
    if not is_url(source):
        return split_part(source)
    url, _, part = source.partition("#")
    return url, part


def _from_file(module: Any, init: str) -> dict[str, Tensor]:
    """Return the part of a file that is a module, under the module's own names."""
    path, part = split_part(init)
    return model_part(read_state(path), module.state_dict(), init, part)[0]


def _load(tower: Any, config: WeightedTower, state: Mapping[str, Tensor], init: str) -> list[str]:
    """Load weights under the tower's names; return which of them were resampled."""
    own = tower.state_dict()
    # Old files lack the counters of the batches that running moments come from; nothing reads them.
    counters = {
        name: count
        for name, count in own.items()
        if name.endswith(COUNTER) and name.removesuffix(COUNTER) + "running_mean" in state
    }
    # A file of a model of open_clip or transformers does not say how its images are normalised: as the tower's are.
    pixels = {name: own[name] for name in ("mean", "std") if name in own}
    scalars = {name: p.reshape(1) for name, p in state.items() if p.ndim == 0 and name in own and own[name].ndim == 1}
    try:
        fitting, notes = fit_to_tower(tower, config, {**counters, **pixels, **state, **scalars})
    except ValueError as error:
        raise ValueError(
            f"{init} does not fit the tower: {error}; change the tower to fit these weights, choose others, or name "
            "the part of the file that is the model, as FILE#PREFIX (only positions are resampled, where timm or "
            "open_clip does so)"
        ) from error
    tower.load_state_dict(fitting, strict=True)
    return notes
