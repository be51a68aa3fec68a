"""The numbers in which a model's forward pass computes."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from threetowers.cache.processes.float32_products import exact_products

# mixed: float32 weights under bfloat16 autocast, as in training; else the type of weights and products alike.
PrecisionName = Literal["float32", "mixed", "bfloat16", "float16"]


def weight_dtype(precision: PrecisionName) -> torch.dtype:
    """Return the type of the weights in a precision."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "mixed" else precision)
    return dtype


def arithmetic(precision: PrecisionName, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass in a precision. float32 is exact, not the TF32 of cuDNN's convolutions."""
    if precision == "float32":
        return exact_products()
    if precision == "mixed":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
