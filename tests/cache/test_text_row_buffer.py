"""Runs of rows: packed in the order of the samples, whatever the order in which captions are embedded."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.caches import DTYPES, make_text_cache, some_captions, text_manifest
from threetowers.cache.format.done_record import DoneRecord, read_done_record
from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError, read_manifest
from threetowers.cache.format.row_buffer import RoundingError
from threetowers.cache.format.store import Arrays, read_tar_rows
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.captions import caption_hash
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash


def buffer_of(n: int, captions: int = 100, dtype: str = "float16") -> TextRowBuffer:
    index = TarIndex("/0.tar", 1, "0", SampleList([(f"k{i}", {}) for i in range(n)]), {})
    return TextRowBuffer(index, text_manifest(3, n, captions, dtype, chunk_rows=4))


def read(folder: Path, tar_id: int) -> tuple[DoneRecord, Arrays]:
    storage = open_storage(folder)
    manifest = read_manifest(storage)
    entry = read_table(storage).entries[tar_id]
    record = read_done_record(storage, manifest, entry)
    return record, read_tar_rows(storage, manifest, entry, record)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    most=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_run_of_a_sample_holds_its_captions(
    sizes: list[int], most: int, dtype: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    tars = some_captions(np.random.default_rng(seed), sizes, most)
    sources = ("txt", "json.captions")
    embeddings = make_text_cache(folder, tars, 5, dtype, sources)
    tier = storage_dtype(dtype)
    for tar_id, tar in enumerate(tars):
        record, found = read(folder, tar_id)
        rows = [(caption, source) for sample in tar for source, captions in sample.items() for caption in captions]
        end_n = np.cumsum([sum(map(len, sample.values())) for sample in tar])
        assert found["row_end"][: len(tar)].tolist() == end_n.tolist()
        assert record.n_rows == len(rows)
        assert record.n_ok == sum(bool(sample) for sample in tar)
        assert record.counts == ({"no_caption": len(tar) - record.n_ok} if record.n_ok < len(tar) else {})
        assert found["key_hash"][: len(tar)].tolist() == [key_hash(f"{tar_id}/{k}") for k in range(len(tar))]
        assert found["caption_hash"][: len(rows)].tolist() == [caption_hash(caption) for caption, _ in rows]
        assert found["caption_source"][: len(rows)].tolist() == [sources.index(source) for _, source in rows]
        scale = found["scale"] if tier.scaled else None
        decoded = tier.decode(found["emb"], scale)
        if rows:
            expected = np.stack([embeddings[caption] for caption, _ in rows])
            stored = tier.decode(*tier.encode(expected))
            assert np.array_equal(decoded[: len(rows)], stored)
            norm_r = np.linalg.norm(stored.astype(np.float64), axis=1)
            assert record.norms.mean == pytest.approx(norm_r.mean())
            assert record.cosines.min is not None
            assert record.cosines.min > tier.min_cosine
        else:
            assert record.norms.mean is None
        assert np.isnan(decoded[len(rows) :]).all()
        assert all(len(crcs) == -(-len(rows) // 4) for crcs in record.chunk_crc32c.values())


def test_equal_captions_are_embedded_once() -> None:
    rows = buffer_of(3)
    rows.set_captions(2, {"txt": ["a", "b"]})
    rows.set_captions(0, {"txt": ["b", "b"]})
    rows.set_captions(1, {"json.caption": ["c", "a"]})
    assert rows.captions == ["a", "b", "c"]
    rows.set_embeddings([2, 0, 1], np.array([[3, 3, 3], [1, 1, 1], [2, 2, 2]], np.float32))
    rows.check_complete()
    stored = rows.stored_arrays()
    assert stored["emb"][:, 0].tolist() == [2, 2, 3, 1, 1, 2]
    assert stored["row_end"].tolist() == [2, 4, 6]
    assert stored["caption_source"].tolist() == [0, 0, 2, 2, 0, 0]


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "embedding is nonfinite"), (1e6, "1e\\+06 overflows float16")])
def test_a_sample_with_a_nonfinite_row_is_rejected_whole(value: float, reason: str) -> None:
    rows = buffer_of(4)
    for ordinal, captions in enumerate((["a", "bad"], ["b"], ["bad"], ["a", "c"])):
        rows.set_captions(ordinal, {"txt": captions})
    features = np.ones((4, 3), np.float32)
    features[1, 1] = value
    rows.set_embeddings([0, 1, 2, 3], features)
    assert rows.status_n.tolist() == [RowStatus.NON_FINITE, RowStatus.OK, RowStatus.NON_FINITE, RowStatus.OK]
    assert [bad.ordinal for bad in rows.bad] == [0, 2]
    assert all(re.search(rf"caption 'bad': .*{reason}", bad.reason) for bad in rows.bad)
    stored = rows.stored_arrays()
    assert stored["row_end"].tolist() == [0, 1, 1, 3]
    assert stored["caption_hash"].tolist() == [caption_hash(caption) for caption in ("b", "a", "c")]
    assert np.isfinite(stored["emb"]).all()
    assert rows.cosines().min == pytest.approx(1)
    assert rows.counts() == {"non_finite": 2}


def test_a_row_that_the_dtype_changes_too_much_stops_the_build() -> None:
    rows = buffer_of(2, dtype="int8")
    rows.set_captions(1, {"txt": ["fine", "x" * 100]})
    rows.reject(0, RowStatus.NO_CAPTION, "no caption")
    rows.set_embeddings([0], np.ones((1, 3), np.float32))
    rows.min_cosine = 0.999995
    message = r"'k1' \(ordinal 1\), caption 'x{60}\.\.\.': stored as int8 its cosine .* sufficient here: float16"
    with pytest.raises(RoundingError, match=message):
        rows.set_embeddings([1], np.array([[127, 0.4, 0.4]], np.float32))


def test_a_tar_with_too_many_captions_names_the_knob() -> None:
    rows = buffer_of(3, captions=5)
    rows.set_captions(0, {"txt": list("abcde")})
    with pytest.raises(ManifestError, match=r"/0\.tar: 9 captions in the first 2 samples.*at most 8.*--rows-per-tar"):
        rows.set_captions(1, {"txt": list("abcd")})


def test_what_was_not_embedded_is_noticed() -> None:
    rows = buffer_of(2)
    rows.set_captions(0, {"txt": ["a", "b"]})
    with pytest.raises(RuntimeError, match=r"no row for ordinals \[1\]"):
        rows.check_complete()
    rows.set_captions(1, {"txt": ["a"]})
    rows.set_embeddings([0], np.ones((1, 3), np.float32))
    with pytest.raises(RuntimeError, match=r"captions of ordinals \[0\] were not embedded"):
        rows.check_complete()
