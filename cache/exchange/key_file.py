"""Files that say what each row of a matrix is of: keys of samples, or captions."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.npy_file import open_npy
from threetowers.cache.exchange.parquet import BATCH_ROWS, open_parquet, read_text_column


def count_keys(path: Path, column: str) -> int:
    """Return how many keys a file has. Raises BadSource for one that cannot be read."""
    if path.suffix == ".parquet":
        return int(open_parquet(path, column).metadata.num_rows)
    if path.suffix == ".npy":
        return len(_open_strings(path))
    return sum(len(lines) for lines in _read_lines(path))


def read_keys(path: Path, column: str) -> Iterator[Sequence[str]]:
    """Yield the keys of a file in their order, many at a time.

    Args:
        path: A Parquet file, an .npy file of strings, or a text file with a key on each line.
        column: Of a Parquet file.

    Raises:
        BadSource: The file cannot be read, or something in it is no text.
    """
    row = 0
    for keys in _read(path, column):
        for i, key in enumerate(keys):
            if not isinstance(key, str):
                raise BadSource(f"{path}: row {row + i}: expected text, found {key!r}")
        yield keys
        row += len(keys)


def _read(path: Path, column: str) -> Iterator[Sequence[str]]:
    if path.suffix == ".parquet":
        yield from read_text_column(path, column)
    elif path.suffix == ".npy":
        strings = _open_strings(path)
        for start in range(0, len(strings), BATCH_ROWS):
            yield strings[start : start + BATCH_ROWS].tolist()
    else:
        yield from _read_lines(path)


def _open_strings(path: Path) -> npt.NDArray[np.str_]:
    strings = open_npy(path)
    if strings.ndim != 1 or strings.dtype.kind != "U":
        raise BadSource(f"{path}: expected a vector of strings, found {strings.dtype} of shape {strings.shape}")
    return strings


def _read_lines(path: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                lines.append(line.rstrip("\r\n"))
                if len(lines) == BATCH_ROWS:
                    yield lines
                    lines = []
    except FileNotFoundError:
        raise BadSource(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise BadSource(f"{path}: expected UTF-8 with a key on each line, found bytes that are not: {error}") from None
    yield lines
