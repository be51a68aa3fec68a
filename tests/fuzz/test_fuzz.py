"""Whatever is wrong with tars: samples in = samples used + samples reported, and rows belong to their samples.

The tests draw the same data sets each time; with FUZZ_EXAMPLES (`make fuzz`) so many others are drawn.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import xxhash
import zarr
from hypothesis import HealthCheck, event, given, settings
from safetensors.torch import save_file

from tests.fuzz.random_tars import MAX_PIXELS, WHOLE, PackedSample, PackedTar, data_sets, write
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import decode_rgb
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash
from threetowers.cache.webdataset.tar_list import TarList, index_tars
from threetowers.eval.datasets.image_set import read_images
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data.caption_corpus import read_corpus
from threetowers.trainer.data.loader import TrainingSampleReader, training_loader
from threetowers.trainer.data.run_samples import open_samples

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a small encoder with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return f"timm:test_resnet@32:{path}"


@pytest.fixture(scope="module")
def embed(encoder: str) -> Callable[[bytes], np.ndarray]:
    """Embed an image file by that encoder."""
    side = load_frozen_encoder(encoder).side("image")

    def embed_file(encoded: bytes) -> np.ndarray:
        pixels = torch.as_tensor(side.transform(decode_rgb(encoded, max_pixels=MAX_PIXELS)))
        return side.embed(pixels[None]).numpy()[0]

    return embed_file


@pytest.fixture
def folders() -> Iterator[Callable[[], Path]]:
    """Make a new folder for each data set; all are removed at the end."""
    with tempfile.TemporaryDirectory() as root:
        yield lambda: Path(tempfile.mkdtemp(dir=root))


def listed_tars(tars: list[PackedTar], paths: list[str]) -> tuple[TarList, list[tuple[TarIndex, PackedTar]]]:
    """Index tars, check that each is used or reported, and return those that are used with what they were made of."""
    listed = index_tars(paths, on_bad="skip_tars")
    used = {index.location: index for index in listed.tars}
    assert len(used) + len(listed.empty) + len(listed.bad) == len(paths)
    for path, tar in zip(paths, tars, strict=True):
        event(f"{tar.damage}: {'used' if path in used else 'not used'}")
        places = [path in used, path in listed.empty, any(path in message for message in listed.bad)]
        assert sum(places) == 1, f"{path} ({tar.damage}) is in {sum(places)} places: {listed.bad}"
        if tar.damage in WHOLE:
            assert places == [bool(tar.samples), not tar.samples, False]
        if tar.damage in ("compressed", "no end marker"):
            assert path in used or not any(places[:2])
    pairs = [(used[path], tar) for path, tar in zip(paths, tars, strict=True) if path in used]
    for index, tar in pairs:
        keys = [index.samples.key(ordinal) for ordinal in range(len(index.samples))]
        assert keys == [sample.key for sample in tar.samples]
    return listed, pairs


def image_of(index: TarIndex, ordinal: int, data: bytes) -> bytes | None:
    """Return the bytes of a sample's image, read from the file without this package's reader."""
    sample = index.samples[ordinal]
    if sample.image is None:
        return None
    offset, size = sample.members[sample.image]
    return data[offset : offset + size]


@fuzz
@given(tars=data_sets())
def test_a_cache_has_a_row_or_a_status_for_every_sample(
    tars: list[PackedTar], encoder: str, embed: Callable[[bytes], np.ndarray], folders: Callable[[], Path]
) -> None:
    folder = folders()
    paths = write(tars, folder)
    _, pairs = listed_tars(tars, paths)
    config = BuildConfig(
        tars=paths,
        output_dir=folder / "cache",
        encoder=encoder,
        device="cpu",
        threads=1,
        batch_size=4,
        max_pixels=MAX_PIXELS,
        on_bad="skip_tars",
    )
    if not pairs:
        with pytest.raises(BadTar, match="none of"):
            build_cache(config)
        return
    if all(sample.defect for index, _ in pairs for sample in index.samples):
        with pytest.raises(BadSample, match="none of"):
            build_cache(config)
        return
    report = build_cache(config)
    assert report.samples == sum(len(index.samples) for index, _ in pairs)
    assert report.samples == report.ok + sum(report.counts.values())
    assert len(report.left_out.empty) + len(report.left_out.bad) + report.tars_built == len(paths)

    cache = EmbeddingCache.open(folder / "cache")
    image_hashes = zarr.open_array(folder / "cache/store.zarr/image_hash", mode="r")
    by_path = {entry.path: entry.id for entry in cache.tars}
    for index, tar in pairs:
        columns = cache.columns(next(id for path, id in by_path.items() if index.location.endswith(path)))
        assert columns.key_hash_n.tolist() == [key_hash(sample.key) for sample in tar.samples]
        assert RowStatus.ABSENT not in columns.status_n
        rows_nD = cache.tar(columns.record.tar_id)
        for ordinal, status in enumerate(columns.status_n):
            encoded = image_of(index, ordinal, tar.data)
            if status != RowStatus.OK:
                assert np.isnan(rows_nD[ordinal]).all()
                continue
            # The row is that of this sample's image: its hash, and what the teacher says of it now.
            assert encoded is not None
            row = columns.record.tar_id * cache.manifest.rows_per_tar + ordinal
            assert image_hashes[row] == xxhash.xxh3_64_intdigest(encoded)
            np.testing.assert_allclose(rows_nD[ordinal], embed(encoded), rtol=2e-3, atol=2e-3)


def tree(paths: list[str], folder: Path, tokenizer: Path, access: str) -> dict[str, Any]:
    """A CLIP run on these tars, as a plain tree."""
    return {
        "output_dir": str(folder / "run"),
        "global_batch_size": 2,
        "duration": {"steps": 1},
        "embed_dim": 8,
        "data": {
            "tars": paths,
            "tokenizer": str(tokenizer),
            "image_size": 32,
            "context_length": 8,
            "group_field": "group",
            "workers": 0,
            "on_bad": "skip_tars",
            "max_pixels": MAX_PIXELS,
            "access": access,
            "num_streams": 2,
        },
        "towers": {
            "image": {"kind": "timm", "model": "test_vit"},
            "text": {"kind": "text", "width": 8, "depth": 1, "heads": 2},
        },
        "heads": {"f": {"of": "image"}, "g": {"of": "text"}},
        "terms": {"image-text": {"x": "f", "y": "g"}},
        "deploy": {"image": "f", "text": "g"},
        "log": {"tensorboard": False},
    }


def packed(pairs: list[tuple[TarIndex, PackedTar]]) -> list[PackedSample]:
    return [sample for _, tar in pairs for sample in tar.samples]


def is_own(caption: str, sample: PackedSample, damage: str) -> bool:
    """Whether a caption is of this sample: captions name the key. A flipped bit may be in the name."""
    return damage == "flipped bit" or sample.key in caption


@fuzz
@given(tars=data_sets())
def test_a_run_uses_or_reports_every_sample(
    tars: list[PackedTar], tokenizer: Path, folders: Callable[[], Path]
) -> None:
    folder = folders()
    paths = write(tars, folder)
    _, pairs = listed_tars(tars, paths)
    config = parse(tree(paths, folder, tokenizer, "random"))
    try:
        samples = open_samples(config, folder)
    except (BadTar, ConfigError) as error:  # nothing to read, or too little for a batch
        event(f"a run: {type(error).__name__}")
        return
    assert samples.total == len(packed(pairs))
    visited = samples.epoch_indices(0)
    assert len(visited) + sum(samples.left_out.values()) == samples.total

    # Each sample is its own, or is reported.
    reader = TrainingSampleReader(config, samples)
    damages = [tar.damage for _, tar in pairs for _ in tar.samples]
    usable = []
    for index in visited.tolist():
        sample = packed(pairs)[index]
        try:
            found = reader.read(0, index)
        except BadSample as error:
            named = bool(error.reason) and sample.key in str(error)
            assert named, error  # noqa: PT017 - what is caught here is one of the outcomes
            continue
        usable.append(index)
        assert found.image is not None
        assert found.captions is not None
        (caption,) = found.captions
        assert is_own(caption, sample, damages[index])

    # The batches of an epoch hold the same samples, by either access.
    steps = len(visited) // 2
    for access in ("random", "sequential"):
        run = parse(tree(paths, folder, tokenizer, access))
        batches = list(
            training_loader(run, open_samples(run, folder), SentencePieceTokenizer.load(tokenizer), 0, 1, 0, steps)
        )
        assert sum(len(batch) + len(batch.bad) for batch in batches) == 2 * steps
        assert all(len(batch.bad) == len(batch.reasons) for batch in batches)
        if len(visited) % 2 == 0:
            assert sum(len(batch) for batch in batches) == len(usable)


@fuzz
@given(tars=data_sets())
def test_the_tokenizer_and_evaluation_use_or_report_every_sample(
    tars: list[PackedTar], folders: Callable[[], Path]
) -> None:
    folder = folders()
    paths = write(tars, folder)
    listed, pairs = listed_tars(tars, paths)

    if not pairs:
        with pytest.raises(BadTar, match="none of"):
            read_corpus(paths, DEFAULT_CAPTIONS, limit=1000, on_bad="skip_tars")
        return
    corpus = read_corpus(paths, DEFAULT_CAPTIONS, limit=1000, on_bad="skip_tars")
    assert corpus.n_samples + sum(corpus.bad_samples.values()) == len(packed(pairs))
    assert corpus.n_tars + len(corpus.left_out.empty) + len(corpus.left_out.bad) == len(paths)
    assert len(corpus.left_out.bad) == len(listed.bad)
    keys = {sample.key for sample in packed(pairs)}
    if all(tar.damage != "flipped bit" for tar in tars):
        assert all(any(key in caption for key in keys) for caption in corpus.captions)

    try:
        images = read_images([index for index, _ in pairs], max_pixels=MAX_PIXELS)
    except ValueError as error:
        assert "no usable image" in str(error)  # noqa: PT017 - as above
        return
    assert len(images.images) + len(images.skipped) == len(packed(pairs))
    for image in images.images:
        index, tar = pairs[image.tar]
        assert image.key == tar.samples[image.ordinal].key
        assert images.encoded(image) == image_of(index, image.ordinal, tar.data)
        assert all(is_own(caption, tar.samples[image.ordinal], tar.damage) for caption in image.captions)
