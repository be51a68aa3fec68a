"""Kernel arguments as the CUDA driver takes them: values laid out like the C++ parameters, and a table of pointers."""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class In:
    """A tensor that a kernel only reads; None passes a null pointer."""

    tensor: Tensor | None


@dataclass(frozen=True, slots=True)
class Out:
    """A tensor that a kernel writes; None passes a null pointer."""

    tensor: Tensor | None


Scalar = In | Out | int | float
Argument = Scalar | tuple[Scalar, ...]
"""int is C++ int, float is float, and a tuple a struct of its parts, passed by value."""


class PackedArguments:
    """Arguments in their own memory, for as long as this object lives. Takes microseconds: it is on every launch."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        parts = [argument if isinstance(argument, tuple) else (argument,) for argument in arguments]
        formats = ["".join(map(_code, part)) for part in parts]
        sizes = [-(-struct.calcsize(form) // 16) * 16 for form in formats]
        self._values = ctypes.create_string_buffer(sum(sizes))
        starts = [0, *itertools.accumulate(sizes)]
        for form, start, part in zip(formats, starts, parts, strict=False):
            struct.pack_into(form, self._values, start, *map(_value, part))
        base = ctypes.addressof(self._values)
        self.table = (ctypes.c_void_p * len(parts))(*[base + start for start in starts[:-1]])


def _code(part: Scalar) -> str:
    """Return the part's letter in `struct`, whose native alignment is that of C++."""
    if isinstance(part, In | Out):
        return "P"
    return "i" if isinstance(part, int) else "f"


def _value(part: Scalar) -> int | float:
    if not isinstance(part, In | Out):
        return part
    return 0 if part.tensor is None else part.tensor.data_ptr()
