"""The compiled sweep, if this installation has one that fits."""

import ctypes
import logging
from functools import cache
from pathlib import Path

INTERFACE_VERSION = 6  # of sweep.cpp's C interface
logger = logging.getLogger(__name__)

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_TILE = [_I, _I, _P, _L, _L, _F]  # isa, threads, dots, rows, cols, factor
_TILES = [_I, _I, _P, _L, _L, _L, _P]  # isa, threads, dots, teachers, rows, cols, factors
_EXCLUDED = [_L, _P, _P]  # diagonal, row labels, column labels
_LIMITS = [_P, _P]  # of rows, of columns
C_FUNCTIONS: dict[str, tuple[list[type], type | None]] = {
    "threetowers_sweep_version": ([], _I),
    "threetowers_sweep_isa": ([], _I),
    "threetowers_sweep_scratch": ([_L, _L, _L], _L),
    "threetowers_sweep_stats": ([*_TILE, *_EXCLUDED, *_LIMITS, *[_P] * 5], None),
    "threetowers_sweep_softmax_grad": ([*_TILE, *_EXCLUDED, *_LIMITS, *[_P] * 5], None),
    "threetowers_sweep_sigmoid": ([*_TILE, _F, *_EXCLUDED, *_LIMITS, *[_P] * 7], None),
    "threetowers_sweep_distill_stats": ([*_TILES, *_EXCLUDED, *[_P] * 3], None),
    "threetowers_sweep_distill_grad": ([*_TILES, *_EXCLUDED, *[_P] * 2], None),
    "threetowers_sweep_distill_sigmoid": ([*_TILES, _P, *_EXCLUDED, *[_P] * 8], None),
}


@cache
def sweep_library() -> ctypes.CDLL | None:
    """Return the loaded library; None, with one warning in the log, where there is none (torch ops then take over)."""
    fault = "it was not built: this installation had no C++ compiler"
    for path in sorted(Path(__file__).parent.glob("sweep*.so")):
        try:
            library = ctypes.CDLL(str(path))
            for name, (arguments, result) in C_FUNCTIONS.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, result
            if library.threetowers_sweep_version() == INTERFACE_VERSION:
                return library
            fault = f"{path.name} is from an older build"
        except (OSError, AttributeError) as error:
            fault = f"{path.name} does not load ({error})"
    logger.warning(
        "CPU losses run in plain torch ops, slower: no C++ sweep, %s. Reinstall threetowers to build it.", fault
    )
    return None
