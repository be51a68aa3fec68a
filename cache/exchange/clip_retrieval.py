"""The folders of clip-retrieval, from which autofaiss and embedding-reader read too.

`img_emb/img_emb_N.npy` and `text_emb/text_emb_N.npy` hold the rows of part N, `metadata/metadata_N.parquet` a line for
each row: `image_path`, which of webdatasets is the key of the sample, `caption`, and the fields of its json member.
N may begin with zeros. The rows have unit norm. Source: `clip_inference/writer.py` of rom1504/clip-retrieval.
"""

import re
from pathlib import Path

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.matrix import MatrixPart
from threetowers.cache.format.manifest import Side

ROWS_NAMES: dict[Side, str] = {"image": "img_emb", "text": "text_emb"}
METADATA = "metadata"
KEY_COLUMNS: dict[Side, str] = {"image": "image_path", "text": "caption"}


def rows_path(folder: Path, of: Side, number: str) -> Path:
    """Return the matrix of a part."""
    name = ROWS_NAMES[of]
    return folder / name / f"{name}_{number}.npy"


def metadata_path(folder: Path, number: str) -> Path:
    """Return the table of a part."""
    return folder / METADATA / f"{METADATA}_{number}.parquet"


def open_clip_retrieval(folder: Path, of: Side, column: str | None = None) -> list[MatrixPart]:
    """Open the parts of one side of such a folder.

    Args:
        folder: The folder.
        of: Which side.
        column: The column with the keys of the samples, or the captions; None: clip-retrieval's own.

    Raises:
        BadSource: There are no parts, or a part lacks one of its files; and as for `MatrixPart.open`.
    """
    name = ROWS_NAMES[of]
    with_rows = _numbers(folder / name, name, ".npy")
    with_metadata = _numbers(folder / METADATA, METADATA, ".parquet")
    for numbers, others, path in (
        (with_rows, with_metadata, metadata_path),
        (with_metadata, with_rows, lambda folder, number: rows_path(folder, of, number)),
    ):
        if lacking := sorted(numbers - others):
            raise BadSource(
                f"{path(folder, lacking[0])}: no such file, and {len(lacking)} of {len(numbers | others)} parts are "
                "like it: expected rows and metadata of each part"
            )
    if not with_rows:
        raise BadSource(f"{folder}: expected {name}/{name}_0.npy, ... and {METADATA}/{METADATA}_0.parquet, ...")
    return [
        MatrixPart.open(rows_path(folder, of, number), metadata_path(folder, number), column or KEY_COLUMNS[of])
        for number in sorted(with_rows, key=int)
    ]


def _numbers(folder: Path, name: str, suffix: str) -> set[str]:
    """Return the numbers of the parts in a folder, as they are written."""
    pattern = re.compile(rf"{name}_(\d+){re.escape(suffix)}")
    return {found[1] for path in folder.glob(f"*{suffix}") if (found := pattern.fullmatch(path.name))}
