"""A model's tensors by name, each once: towers that share parameters have several names for one."""

from collections.abc import Mapping

from torch import Tensor, nn


def deduplicated_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters and buffers; a shared one under its first name alone."""
    aliases = _aliases(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in aliases}


def load_deduplicated(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `deduplicated_state_dict` returned.

    Raises:
        ValueError: If names or shapes differ from the module's.
    """
    shared = {alias: state[name] for alias, name in _aliases(module).items() if name in state}
    try:
        module.load_state_dict({**state, **shared}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights are of another model: {error}") from error


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return every further name of a shared parameter with its first name."""
    first_names: dict[int, str] = {}
    aliases = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(p), name)
        if first != name:
            aliases[name] = first
    return aliases
