"""The arithmetic of a model: its precision, products under autocast, and what stays float32 in any case."""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from threetowers.trainer.config import Precision, TrainConfig
from threetowers.trainer.model.running_moments import NAMES


def resolve_precision(config: TrainConfig, began: Precision | None = None) -> TrainConfig:
    """Return a config with the precision that null stands for: that in which its run began, else this machine's."""
    precision = config.engine.precision or began or new_run_precision()
    return replace(config, engine=replace(config.engine, precision=precision))


def new_run_precision() -> Precision:
    """Return the precision of a run that names none and begins on this machine."""
    return "mixed" if torch.cuda.is_available() else "float32"


def autocast(enabled: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products are computed in bfloat16, from weights of any type.

    Torch has none for the meta device, where nothing is computed.
    """
    if not enabled or device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products are computed in the type of their factors, also inside of `autocast`."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def float32_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are float32 where the others are not, by name.

    They are the log-scales and biases of a `TowerModel`, which bfloat16 would round to steps of 3 % near a temperature
    of 100, and the parameters of batch norms, which torch takes in the type of their running moments alone.
    """
    found = {}
    for path, module in model.named_modules():
        moments = any(name in NAMES for name, _ in module.named_buffers(recurse=False))
        for name, p in module.named_parameters(path, recurse=False):
            if moments or path in ("log_scales", "biases"):
                found[name] = p
    return found


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters but those that stay float32. Buffers keep their type."""
    kept = {id(p) for p in float32_parameters(model).values()}
    for p in model.parameters():
        if id(p) not in kept:
            p.data = p.data.to(dtype)
