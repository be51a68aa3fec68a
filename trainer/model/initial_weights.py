"""The weights of a tower before its first step: from timm's hub, a package, or a file."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from threetowers.cache.encoders.timm_models import head_tensors
from threetowers.cache.encoders.weights_file import model_part, read_state, require_finite, split_part
from threetowers.trainer.config import ImageTower, TextTower
from threetowers.trainer.model.resampling import fit_to_tower

COUNTER = "num_batches_tracked"


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
    try:
        if isinstance(config, TextTower):
            state = _from_file(tower, config.init)
        else:
            weights = _image_weights(tower.model, config, config.init)
            head: set[str] = set()
            if config.specialize is None and weights.keys() - tower.model.state_dict().keys():
                head = head_tensors(config.model, **config.args)
            state = {f"model.{name}": tensor for name, tensor in weights.items() if name not in head}
        notes = _load(tower, config, state, config.init)
        require_finite(tower, config.init)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return [f"{key}: resampled {note}" for note in notes]


def _image_weights(model: Any, config: ImageTower, init: str) -> dict[str, Tensor]:
    """Return the weights for a timm model, perhaps a specialised one, under its own names."""
    if not (init == "pretrained" or init.startswith("package:")):
        return _from_file(model, init)
    if config.specialize is not None:
        raise ValueError(f"{init!r} holds a plain {config.model}, but the tower is specialised; leave init out")
    from threetowers.cache.encoders.timm_encoder import load_timm_model  # a run that reads rows of a cache needs none

    return dict(load_timm_model(config.model, init)[0].state_dict())


def _from_file(module: Any, init: str) -> dict[str, Tensor]:
    """Return the part of a file that is a module, under the module's own names."""
    path, part = split_part(init)
    return model_part(read_state(path), module.state_dict(), init, part)[0]


def _load(tower: Any, config: ImageTower | TextTower, state: Mapping[str, Tensor], init: str) -> list[str]:
    """Load weights under the tower's names; return which of them were resampled."""
    # Old files lack the counters of the batches that running moments come from; nothing reads them.
    counters = {
        name: count
        for name, count in tower.state_dict().items()
        if name.endswith(COUNTER) and name.removesuffix(COUNTER) + "running_mean" in state
    }
    try:
        fitting, notes = fit_to_tower(tower, config, {**counters, **state})
    except ValueError as error:
        raise ValueError(
            f"{init} does not fit the tower: {error}; change the tower to fit these weights, choose others, or name "
            "the part of the file that is the model, as FILE#PREFIX (only positions are resampled, where timm or "
            "open_clip does so)"
        ) from error
    tower.load_state_dict(fitting, strict=True)
    return notes
