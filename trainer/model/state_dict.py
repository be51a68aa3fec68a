"""A model's tensors by name, each once: towers that share parameters have several names for one."""

from collections.abc import Mapping

from torch import Tensor, nn


def distinct_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters and buffers; what is shared comes under its first name."""
    again = _aliases(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in again}


def load_distinct(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `distinct_state` gave. Raises ValueError when names or shapes are others than the module's."""
    again = {alias: state[name] for alias, name in _aliases(module).items() if name in state}
    try:
        module.load_state_dict({**state, **again}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights are of another model: {error}") from error


def _aliases(module: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter -> its first name."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}
