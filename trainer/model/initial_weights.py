"""The weights of a tower before its first step: from timm's hub, a package, or a file."""

from typing import Any

from torch import Tensor

from threetowers.cache.encoders.timm_models import head_tensors
from threetowers.cache.encoders.weights_file import load_strictly, model_part, read_state, require_finite, split_part
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
    try:
        if isinstance(config, TextTower):
            state = _from_file(tower, config.init)
        else:
            weights = _image_weights(tower.model, config, config.init)
            head: set[str] = set()
            if config.specialize is None and weights.keys() - tower.model.state_dict().keys():
                head = head_tensors(config.model, **config.args)
            state = {f"model.{name}": tensor for name, tensor in weights.items() if name not in head}
        load_strictly(tower, state, config.init, "the tower")
        require_finite(tower, config.init)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _image_weights(model: Any, config: ImageTower, init: str) -> dict[str, Tensor]:
    """Return the weights for a timm model, perhaps a specialised one, under its own names."""
    if not (init == "pretrained" or init.startswith("package:")):
        state = _from_file(model, init)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        resized = [name for name in shapes if name in state and state[name].shape != shapes[name]]
        if not resized or config.specialize is not None:
            return state
    elif config.specialize is not None:
        raise ValueError(f"{init!r} holds a plain {config.model}, but the tower is specialised; leave init out")
    from threetowers.cache.encoders.teacher import load_teacher  # a run that reads rows of a cache needs none of it

    return dict(load_teacher(config.model, init, config.args.get("img_size")).model.state_dict())


def _from_file(module: Any, init: str) -> dict[str, Tensor]:
    """Return the part of a file that is a module, under the module's own names."""
    path, part = split_part(init)
    return model_part(read_state(path), module.state_dict(), init, part)[0]
