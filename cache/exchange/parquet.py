"""Columns of text in Parquet files, by pyarrow, which is an optional package."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threetowers.cache.exchange.bad_source import BadSource

BATCH_ROWS = 65536


def require_pyarrow() -> None:
    """Raise ValueError unless Parquet files can be read."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("Parquet files are read and written by pyarrow, not found: pip install 'threetowers[parquet]'")


def open_parquet(path: Path, column: str) -> Any:
    """Return a `pyarrow.parquet.ParquetFile` that has a column of this name.

    Raises:
        BadSource: The file is none, or lacks the column.
        ValueError: There is no pyarrow.
    """
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise BadSource(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise BadSource(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
    columns = file.schema_arrow.names
    if column not in columns:
        raise BadSource(
            f"{path}: expected a column {column!r}, found {', '.join(columns)}: name another (--key-column)"
        )
    return file


def read_text_column(path: Path, column: str) -> Iterator[list[Any]]:
    """Yield the values of a column, up to BATCH_ROWS at a time. Raises as `open_parquet` does."""
    for batch in open_parquet(path, column).iter_batches(BATCH_ROWS, columns=[column]):
        yield batch.column(0).to_pylist()
