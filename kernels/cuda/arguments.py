"""Kernel arguments as the CUDA driver wants them: values laid out like the C++ parameters, and a table of pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class In:
    """A tensor that a kernel only reads; None passes a null pointer."""

    tensor: Tensor | None


@dataclass(frozen=True, slots=True)
class Out:
    """A tensor that a kernel writes; None passes a null pointer."""

    tensor: Tensor | None


Argument = In | Out | int | float | tuple["Argument", ...]
"""int is C++ int, float is float, and a tuple a struct of its parts, passed by value."""


class Packed:
    """Arguments in memory of their own, for as long as this object lives."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self._values = [_value(argument) for argument in arguments]
        self.table = (ctypes.c_void_p * len(self._values))(*[ctypes.addressof(value) for value in self._values])


def tensors(arguments: Sequence[Argument]) -> Iterator[In | Out]:
    """Every tensor among the arguments, those inside structs included."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors(argument)
        elif isinstance(argument, In | Out):
            yield argument


def _value(argument: Argument) -> Any:  # a ctypes object
    if isinstance(argument, tuple):
        parts = [_value(part) for part in argument]
        fields = [(f"part{i}", type(part)) for i, part in enumerate(parts)]
        return type("Struct", (ctypes.Structure,), {"_fields_": fields})(*parts)
    if isinstance(argument, In | Out):
        return ctypes.c_void_p(None if argument.tensor is None else argument.tensor.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)
