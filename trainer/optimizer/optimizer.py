"""Which parameters are updated, how fast, and by which optimizer."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from threetowers.trainer.config import ConfigError, Optim, ParameterGroup


def freeze(model: nn.Module, optim: Optim) -> None:
    """Take the gradient from parameters whose group has a learning rate of 0. Raises ConfigError as `grouped`."""
    for _, p, rule in grouped(model, optim):
        if rule is not None and rule.lr == 0:
            p.requires_grad_(False)


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Return torch's parameter groups of what has a gradient: weight decay on matrices only, `lr_factor` by rule."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for _, p, rule in grouped(model, optim):
        if p.requires_grad:
            decay = optim.weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
            key = (1.0 if rule is None else rule.lr, decay if p.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(p)
    if not groups:
        raise ConfigError("optim.param_groups: every parameter is frozen, nothing is left to train")
    return [
        {"params": groups[factor, decay], "weight_decay": decay, "lr_factor": factor, "lr": optim.lr * factor}
        for factor, decay in sorted(groups, reverse=True)
    ]


def grouped(model: nn.Module, optim: Optim) -> Iterator[tuple[str, nn.Parameter, ParameterGroup | None]]:
    """Yield every parameter with its name and the first rule that matches it.

    Raises ConfigError for a pattern that matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    for rule in optim.param_groups:
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise ConfigError(
                f"optim.param_groups: {rule.match!r} matches no parameter; there are {len(names)}, such as {names[:3]}"
            )
    for name, p in model.named_parameters():
        yield name, p, next((rule for rule in optim.param_groups if fnmatchcase(name, rule.match)), None)
