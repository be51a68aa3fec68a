"""Arrays in .npy files, memory-mapped."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from threetowers.cache.exchange.bad_source import BadSource


def open_npy(path: Path) -> npt.NDArray[Any]:
    """Return the array in an .npy file, memory-mapped; nothing is unpickled. Raises BadSource where there is none."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadSource(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError) as error:
        raise BadSource(f"{path}: not an .npy file that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, np.ndarray):
        raise BadSource(f"{path}: expected an .npy file, found an archive")
    return found
