"""The cost of a cache before it is built: bytes, files and hours, measured by building a sample of it.

The sample is packed into tars of its own and built by the real build, so that the rate is that of reading, decoding or
making tokens, embedding and writing together, on this machine.
"""

import dataclasses
import io
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig, Source
from threetowers.cache.builder.opening import requested_manifest
from threetowers.cache.encoders.device_defaults import default_batch_size
from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, TextEncoder
from threetowers.cache.encoders.live import embed, embed_captions, view_pixels
from threetowers.cache.estimate.cost_estimate import CostEstimate, DtypeCost
from threetowers.cache.format.done_record import done_record_name, read_done_record
from threetowers.cache.format.dtypes import STORAGE_DTYPES, StorageDtype, storage_cosines
from threetowers.cache.format.layout import TarRoom, arrays, image_room, stored_bytes, text_room
from threetowers.cache.format.manifest import read_manifest
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.caption_density import captions_per_tar
from threetowers.cache.webdataset.dataset_sample import DatasetSample

MIN_TIMED = 8

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Measured:
    """What was measured on the sample before the build.

    Attributes:
        rows_nD: the embeddings that the dtypes are compared on.
        per_sample: rows of a sample.
        input_rate: of what comes before the forward pass, in one thread.
        bad: bad samples, by the reason.
        densest: captions of the densest tar; 0 of images.
    """

    rows_nD: Float32Array
    per_sample: float
    input_rate: float
    bad: Mapping[str, int]
    densest: int = 0


def estimate(config: EmbeddingConfig, *, ranks: int = 1, sample: int = 256, seed: int = 0) -> CostEstimate:
    """Measure what a cache would cost. Nothing is left behind.

    Args:
        config: samples, encoder and views of the cache.
        ranks: processes that would share the work, each as fast as this one.
        sample: samples to measure on, drawn by `seed` from some of the tars.
        seed: of that sample.

    Raises:
        ValueError: bad input, named in the message; fewer than MIN_TIMED images that can be decoded, or captions.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}: expected at least 1")
    drawn = config.draw(sample, seed)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher = config.load_encoder(device)
    (source,) = config.sources()
    batch_size = config.batch_size or default_batch_size(device, source.of)
    side = teacher.side(source.of)
    if isinstance(side, ImageEncoder):
        measured = _measure_images(drawn, side, source, batch_size)
    else:
        measured = _measure_captions(drawn, side, source, config, batch_size)

    rate, shares, record_bytes = _measure_build(drawn, source, config, device)
    costs = [
        _dtype_cost(dtype, drawn, teacher, source, config, measured, record_bytes) for dtype in STORAGE_DTYPES.values()
    ]
    return CostEstimate(
        n_tars=drawn.n_tars,
        n_samples=drawn.n_samples,
        exact=drawn.exact,
        of=source.of,
        per_sample=measured.per_sample,
        sampled=len(measured.rows_nD),
        bad=dict(measured.bad),
        dim=measured.rows_nD.shape[1],
        views=config.views,
        ranks=ranks,
        rate=rate,
        input_rate=measured.input_rate,
        shares=shares,
        dtypes=tuple(costs),
        notes=drawn.notes,
    )


def _measure_images(drawn: DatasetSample, encoder: ImageEncoder, source: Source, batch_size: int) -> _Measured:
    """Decode and embed the images of the sample."""
    started = time.perf_counter()
    images, bad = drawn.images()
    pixels = [view_pixels(encoder, image, 0, None) for image in images]
    rate = len(drawn.sample) / (time.perf_counter() - started)
    _require(len(pixels), f"{len(pixels)} of {len(drawn.sample)} sampled images can be decoded")
    return _Measured(_finite(embed(encoder, pixels, source.feature, batch_size)), 1.0, rate, bad)


def _measure_captions(
    drawn: DatasetSample, encoder: TextEncoder, source: Source, config: EmbeddingConfig, batch_size: int
) -> _Measured:
    """Make tokens of the captions of the sample, and embed the different ones."""
    caption_format = config.caption_sources().caption_format
    captions: list[str] = []
    bad: Counter[str] = Counter()
    for annotation in drawn.annotations(caption_format):
        captions += annotation.captions
        bad["no caption"] += not annotation.captions
    _require(len(captions), f"the {len(drawn.sample)} sampled samples have {len(captions)} captions")
    with ThreadPoolExecutor() as pool:
        densest = captions_per_tar(drawn.indexed, caption_format, pool)
    started = time.perf_counter()
    encoder.tokenize(captions)
    rate = len(captions) / (time.perf_counter() - started)
    rows_nD = _finite(embed_captions(encoder, captions, source.feature, batch_size))
    return _Measured(rows_nD, len(captions) / len(drawn.sample), rate, +bad, densest)


def _finite(rows_nD: Float32Array) -> Float32Array:
    """Return the finite rows; a build gives the others a status in their place."""
    found_nD: Float32Array = rows_nD[np.isfinite(rows_nD).all(axis=1)]
    _require(len(found_nD), f"{len(found_nD)} of {len(rows_nD)} embeddings are finite")
    return found_nD


def _require(found: int, text: str) -> None:
    if found < MIN_TIMED:
        raise ValueError(f"{text}: expected at least {MIN_TIMED}")


def _measure_build(
    drawn: DatasetSample, source: Source, config: EmbeddingConfig, device: str
) -> tuple[float, dict[str, float], int]:
    """Build the sample, packed twice.

    Returns:
        Images or captions per second in the second tar, the time by stage, and the bytes of a done record.
    """
    with tempfile.TemporaryDirectory(prefix="threetowers-estimate-") as folder:
        tars = [_pack(Path(folder) / f"{i}.tar", drawn, source, config, i) for i in range(2)]
        settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(EmbeddingConfig)}
        settings |= {"tars": tars, "device": device}
        output = Path(folder) / "cache"
        report = build_cache(BuildConfig(**settings, output_dir=output, dtype="float32"))
        storage = open_storage(output)
        record = read_done_record(storage, read_manifest(storage), read_table(storage).entries[1])
        rate = record.n_rows / max(record.seconds, 1e-3)
        return rate, report.shares, storage.size(done_record_name(1)) or 0


def _pack(path: Path, drawn: DatasetSample, source: Source, config: EmbeddingConfig, number: int) -> str:
    """Write the images, or the text members, of the sample to a tar."""
    extensions = config.caption_sources().caption_format.extensions if source.of == "text" else frozenset[str]()
    with tarfile.open(path, "w") as archive:
        for i, at in enumerate(drawn.sample):
            members = drawn.readable(at, extensions) if source.of == "text" else drawn.image_member(at)
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number}-{i}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def _dtype_cost(
    dtype: StorageDtype,
    drawn: DatasetSample,
    teacher: FrozenEncoder,
    source: Source,
    config: EmbeddingConfig,
    measured: _Measured,
    record_bytes: int,
) -> DtypeCost:
    room = _room(dtype.row_bytes(measured.rows_nD.shape[1]), drawn, source, measured)
    manifest = requested_manifest(teacher, source, dtype.name, room, 1, config)
    sizes = [(len(index.samples), round(len(index.samples) * measured.per_sample)) for index in drawn.indexed]
    bytes_per_tar = np.mean([stored_bytes(manifest, n_samples, n_rows) for n_samples, n_rows in sizes]) + record_bytes
    n_arrays = len(arrays(manifest))
    per_tar = n_arrays + 1  # a shard of each array, and the done record
    shared = n_arrays + 3  # zarr.json of each array and of the group, manifest, tar table
    found = storage_cosines(dtype, measured.rows_nD)
    return DtypeCost(
        name=dtype.name,
        bytes=round(float(bytes_per_tar) * drawn.n_tars),
        files=per_tar * drawn.n_tars + shared,
        min_cosine=float(found.min()),
        mean_cosine=float(found.mean()),
        fits=bool(found.min() >= dtype.min_cosine),
    )


def _room(row_bytes: int, drawn: DatasetSample, source: Source, measured: _Measured) -> TarRoom:
    if source.of == "image":
        return image_room(row_bytes, drawn.largest)
    return text_room(row_bytes, drawn.largest, measured.densest)
