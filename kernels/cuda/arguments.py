"""Kernel arguments as the CUDA driver takes them: values laid out like the C++ parameters, and a table of pointers."""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)  # not frozen, which would take three times as long to make: several are, at every launch
class In:
    """A tensor that a kernel only reads; None passes a null pointer."""

    tensor: Tensor | None


@dataclass(slots=True)
class Out:
    """A tensor that a kernel writes; None passes a null pointer."""

    tensor: Tensor | None


Scalar = In | Out | int | float
Argument = Scalar | tuple[Scalar, ...]
"""int is C++ int, float is float, and a tuple a struct of its parts, passed by value."""


class PackedArguments:
    """One kernel's arguments in memory of their own, for as long as this object lives.

    Arguments of later launches of that kernel may replace them in the same places.
    """

    def __init__(self, arguments: Sequence[Argument]) -> None:
        structs = [argument if isinstance(argument, tuple) else (argument,) for argument in arguments]
        formats = ["".join(map(_code, parts)) for parts in structs]
        sizes = [-(-struct.calcsize(form) // 16) * 16 for form in formats]
        starts = [0, *itertools.accumulate(sizes)]

        # One format for all arguments, with bytes between them so that each begins where its pointer says.
        whole = ""
        for form, start in zip(formats, starts, strict=False):
            whole += "x" * (start - struct.calcsize(whole)) + form
        self._format = struct.Struct(whole)
        self._values = ctypes.create_string_buffer(starts[-1])
        base = ctypes.addressof(self._values)
        self.table = (ctypes.c_void_p * len(structs))(*[base + start for start in starts[:-1]])
        self.fill(arguments)

    def fill(self, arguments: Sequence[Argument]) -> None:
        """Replace the arguments by others of the same kinds. Takes microseconds: it is on every launch."""
        values: list[int | float] = []
        for argument in arguments:
            for part in argument if type(argument) is tuple else (argument,):
                if type(part) is int or type(part) is float:
                    values.append(part)
                else:
                    values.append(0 if part.tensor is None else part.tensor.data_ptr())  # type: ignore[union-attr]
        self._format.pack_into(self._values, 0, *values)


def _code(part: Scalar) -> str:
    """Return the part's letter in `struct`, whose native alignment is that of C++."""
    if isinstance(part, In | Out):
        return "P"
    return "i" if isinstance(part, int) else "f"
