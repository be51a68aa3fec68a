"""The optimizer and its parameter groups: learning rate and weight decay by name."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from threetowers.trainer.config import ConfigError, Optim, ParameterGroup
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.adafactor import Adafactor


def freeze(model: nn.Module, optim: Optim) -> None:
    """Freeze the parameters whose group has a learning rate of 0. Raises ConfigError like `rules_of`."""
    for _, p, rule in rules_of(model, optim):
        if rule is not None and rule.lr == 0:
            p.requires_grad_(False)
    model.train(model.training)  # a frozen module goes into evaluation mode


def build_optimizer(model: TowerModel, optim: Optim) -> Optimizer:
    """Return the optimizer of the trained parameters. Raises ConfigError like `parameter_groups`."""
    groups = parameter_groups(model, optim)
    if optim.name == "adafactor":
        return Adafactor(groups, optim.lr, optim.betas)
    # DeepSpeed's fused variants are compiled at first use and round differently on each device.
    return AdamW(groups, optim.lr, optim.betas, weight_decay=0.0)


def parameter_groups(model: TowerModel, optim: Optim) -> list[dict[str, Any]]:
    """Return torch's parameter groups of the trained parameters, by learning rate and weight decay.

    Weight decay is on matrices only; rates go by rule and by layer. Parameters of different types are in different
    groups, as ZeRO makes one long vector of each.

    Raises:
        ConfigError: Every parameter is frozen, or a pattern matches no parameter.
        ValueError: A tower with `layer_decay` has no blocks.
    """
    groups: dict[tuple[float, float, torch.dtype], list[nn.Parameter]] = {}
    factors = rate_factors(model, optim)
    for name, p, rule in rules_of(model, optim):
        if not p.requires_grad:
            continue
        decay = optim.weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
        groups.setdefault((factors[name], decay if p.ndim > 1 else 0.0, p.dtype), []).append(p)
    if not groups:
        raise ConfigError("optim.param_groups: every parameter is frozen; give one of the groups a learning rate")
    return [
        {"params": params, "weight_decay": decay, "lr_factor": factor, "lr": optim.lr * factor}
        for (factor, decay, _), params in sorted(groups.items(), key=_order)
    ]


def rate_factors(model: TowerModel, optim: Optim) -> dict[str, float]:
    """Return the factor of each parameter's learning rate by name, 0 for frozen ones: that of its rule and its layer.

    Raises:
        ConfigError: A pattern matches no parameter.
        ValueError: A tower with `layer_decay` has no blocks.
    """
    of_layers = model.layer_factors()
    factors = {}
    for name, p, rule in rules_of(model, optim):
        by_rule = 1.0 if rule is None else rule.lr
        factors[name] = by_rule * of_layers.get(name, 1.0) if p.requires_grad else 0.0
    return factors


def _order(group: tuple[tuple[float, float, torch.dtype], list[nn.Parameter]]) -> tuple[bool, float, float]:
    """Return the place of a group: float32 last, as DeepSpeed takes the first one's type for that of the model."""
    (factor, decay, dtype), _ = group
    return dtype == torch.float32, -factor, -decay


def rules_of(model: nn.Module, optim: Optim) -> Iterator[tuple[str, nn.Parameter, ParameterGroup | None]]:
    """Yield every parameter with its name and the first rule that matches it.

    Raises:
        ConfigError: A pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for rule in optim.param_groups:
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise ConfigError(
                f"optim.param_groups: {rule.match!r} matches no parameter; there are {len(names)}, such as {names[:3]}"
            )
    for name, p in model.named_parameters():
        yield name, p, next((rule for rule in optim.param_groups if fnmatchcase(name, rule.match)), None)
