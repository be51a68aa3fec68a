"""The arrays in the `npz` or `pth.gz` member of a sample, read without unpickling and within bounds.

`image_emb` has a row for each crop, `text_emb` one for the caption of the sample and, in DataCompDR, one for each
synthetic caption. Other data sets of this layout keep those of `syn_text` in `syn_text_emb`. The columns are those of
all teachers, side by side. `npz` holds float32, `pth.gz` a gzipped state dict of bfloat16.
"""

import gzip
import io
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement
from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.manifest import Side

NPZ = "npz"
PTH = "pth.gz"
EMBEDDING_EXTENSIONS = (NPZ, PTH)  # the one with more bits first
SUFFIX = "_emb"
IMAGE_ROWS = "image_emb"
TEXT_ROWS = "text_emb"
MAX_BYTES = 64 << 20  # of the arrays of a sample when they are unpacked


def read_embeddings(members: Mapping[str, bytes], of: Side) -> dict[str, Float32Array]:
    """Return the (n, W) embeddings of a sample by name: `image_emb`, or all others that end in `_emb`; at least one.

    Args:
        members: The members of the sample by extension.
        of: Which side of the sample they are of.

    Raises:
        BadReinforcement: There are none; their member is damaged or too large, or holds other things than matrices of
            floats.
    """
    for extension in EMBEDDING_EXTENSIONS:
        if extension in members:
            arrays = _read_npz(members[NPZ], of) if extension == NPZ else _read_pth(members[PTH], of)
            if not arrays:
                expected = IMAGE_ROWS if of == "image" else f"{TEXT_ROWS}, nor others of captions"
                raise BadReinforcement(f"{extension}: no {expected}")
            return {name: _as_rows(f"{extension}: {name}", value) for name, value in arrays.items()}
    raise BadReinforcement(f"no member {' or '.join(EMBEDDING_EXTENSIONS)}")


def _is_of(name: Any, of: Side) -> bool:
    return isinstance(name, str) and name.endswith(SUFFIX) and (name == IMAGE_ROWS) == (of == "image")


def _read_npz(data: bytes, of: Side) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > MAX_BYTES:
            raise BadReinforcement(f"{NPZ}: {size} bytes unpacked, expected at most {MAX_BYTES}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if _is_of(name, of)}
    except BadReinforcement:
        raise
    except Exception as error:  # a dozen kinds, and MemoryError where a header tells of more than the file holds
        raise BadReinforcement(f"{NPZ}: truncated, damaged or a pickle: {_first_line(error)}") from error


def _read_pth(data: bytes, of: Side) -> dict[str, Any]:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise BadReinforcement(f"{PTH}: truncated or damaged gzip: {_first_line(error)}") from error
    if len(unpacked) > MAX_BYTES:
        raise BadReinforcement(f"{PTH}: more than {MAX_BYTES} bytes unpacked")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what the error says better
            loaded = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, AssertionError and IndexError among them
        raise BadReinforcement(f"{PTH}: not tensors alone, nothing else is unpickled: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise BadReinforcement(f"{PTH}: expected tensors by name, found {type(loaded).__name__}")
    return {name: value for name, value in loaded.items() if _is_of(name, of)}


def _as_rows(what: str, value: Any) -> Float32Array:
    """Return a tensor or array of floats as (n, W) float32."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided:
        if value.numel() > MAX_BYTES // 4:  # a few stored numbers may stand for many
            raise BadReinforcement(f"{what}: {value.numel()} numbers, expected at most {MAX_BYTES // 4}")
        value = value.detach().to(torch.float32).numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 2:
        with np.errstate(over="ignore"):  # of float64; infinite rows are rejected where they are stored
            rows_nW: npt.NDArray[np.float32] = value.astype(np.float32, copy=False)
        return rows_nW
    found = f"{value.dtype} of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
    raise BadReinforcement(f"{what}: expected a matrix of floats, found {found}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
