"""Reading a cache of text: a run of rows for each sample, and captions that are not those that were embedded."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.caches import DTYPES, CaptionsBySource, make_cache, make_text_cache, some_captions
from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.layout import STORE, RowStatus
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.info import read_info
from threetowers.cache.read.caption_table import CaptionTable
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.read.stream import stream_rows
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.captions import caption_hash

SOURCES = ("txt", "json.captions")
SAMPLES: list[list[CaptionsBySource]] = [
    [{"txt": ["a", "b"], "json.captions": ["c"]}, {}, {"json.captions": ["d", "d", "a"]}, {"txt": ["e"]}],
    [{}, {}],
    [{"txt": ["f", "a", "g", "h", "i", "j"]}],
]


def flat(sample: CaptionsBySource) -> list[str]:
    return [caption for captions in sample.values() for caption in captions]


def stored(row_D: np.ndarray, dtype: str) -> np.ndarray:
    """A row as a reader of this precision sees it."""
    tier = storage_dtype(dtype)
    return tier.decode(*tier.encode(row_D[None]))[0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_row_is_found_by_the_words_of_its_caption(dtype: str, tmp_path: Path) -> None:
    embeddings = make_text_cache(tmp_path, SAMPLES, 5, dtype, SOURCES)
    cache = pickle.loads(pickle.dumps(EmbeddingCache.open(tmp_path)))
    table = CaptionTable(cache, [2, 0, 1])
    assert len(table) == len(embeddings) == 10
    captions = [*embeddings, "a", "a"][::-1]
    expected = np.stack([stored(embeddings[caption], dtype) for caption in captions])
    assert np.array_equal(table.rows(captions), expected)
    assert table.rows([]).shape == (0, 5)
    # Only the tars that are asked for count
    first = CaptionTable(cache, [0])
    message = r"no row of 2 of 3 captions, as of 'j': its 1 tars have rows of 5 captions, from txt, json\.captions"
    with pytest.raises(ManifestError, match=message):
        first.rows(["a", "j", "A"])
    with pytest.raises(ManifestError, match="no row of 1 of 1 captions"):
        CaptionTable(cache, []).rows(["a"])


@settings(max_examples=16, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    dim=st.integers(2, 17),
    dtype=st.sampled_from(DTYPES),
    chunk_rows=st.integers(1, 5),
    open_tars=st.integers(1, 3),
    remote=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_caption_has_its_row(
    sizes: list[int],
    dim: int,
    dtype: str,
    chunk_rows: int,
    open_tars: int,
    remote: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("text")
    where = f"memory://{folder}" if remote else folder
    tars = some_captions(np.random.default_rng(seed), sizes)
    embeddings = make_text_cache(where, tars, dim, dtype, SOURCES, chunk_rows)
    opened = EmbeddingCache.open(where, of="text", open_tars=open_tars, memory=2000)
    everything = opened.array()[:]
    asked: list[tuple[int, int, str, int]] = []
    expected = []
    for tar_id, tar in enumerate(tars):
        whole = [stored(embeddings[caption], dtype) for sample in tar for caption in flat(sample)]
        assert np.array_equal(opened.tar(tar_id), np.array(whole, np.float32).reshape(-1, dim))
        first = tar_id * opened.manifest.rows_per_tar
        if dtype in ("float16", "float32"):
            assert np.array_equal(everything[first : first + len(whole)], opened.tar(tar_id).astype(dtype))
        for ordinal, sample in enumerate(tar):
            at = tar_id, ordinal, f"{tar_id}/{ordinal}"
            captions = flat(sample)
            if not captions:
                with pytest.raises(ManifestError, match="no embedding: no_caption"):
                    opened.captions(*at)
                continue
            rows = np.stack([stored(embeddings[caption], dtype) for caption in captions])
            assert np.array_equal(opened.caption_rows(*at), rows)
            found = opened.captions(*at)
            assert found.hash_k.tolist() == [caption_hash(caption) for caption in captions]
            assert [SOURCES[code] for code in found.source_k] == [source for source in sample for _ in sample[source]]
            opened.check_captions(*at, sample)
            for number, caption in enumerate(captions):
                assert np.array_equal(opened.caption_row(*at, number, caption), rows[number])
                asked.append((*at, number))
                expected.append(rows[number])
    if asked:
        order = np.random.default_rng(seed).permutation(len(asked))
        tar_ids, ordinals, keys, numbers = zip(*(asked[i] for i in order), strict=True)
        rows = opened.rows(tar_ids, ordinals, keys, captions=numbers)
        assert np.array_equal(rows, np.stack([expected[i] for i in order]))
        assert np.array_equal(opened.rows(tar_ids, ordinals, captions=np.array(numbers)), rows)
    assert len(opened) == sum(sizes)
    assert max(len(opened._columns), len(opened._shards)) <= open_tars


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    make_text_cache(folder, SAMPLES, 6, "float16", SOURCES)
    return folder


@pytest.mark.parametrize(
    ("number", "caption", "message"),
    [
        (1, "B", r"caption 1 \('B'\) was changed: the row there is of another caption"),
        (1, "b ", r"caption 1 \('b '\) was changed"),
        (1, "c", r"caption 1 \('c'\) was moved: it has the row of caption 2"),
        (3, "x", r"caption 3 \('x'\) was added: the sample had 3 captions when it was embedded"),
        (3, "a", r"caption 3 \('a'\) was moved: it has the row of caption 0"),
        (3, None, "no caption 3: the sample had 3 when it was embedded"),
        (-1, None, "no caption -1"),
    ],
)
def test_another_caption_has_no_row(number: int, caption: str | None, message: str, cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    with pytest.raises(ManifestError, match=rf"tar 0\.tar \(0\), ordinal 0, key '0/0': {message}"):
        opened.caption_row(0, 0, "0/0", number, caption)
    (rows,) = stream_rows(opened, [0])
    with pytest.raises(ManifestError, match=rf"tar 0\.tar \(0\), ordinal 0, key '0/0': {message}"):
        rows.caption_row(0, "0/0", number, caption)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            {"txt": ["a", "B"], "json.captions": ["c"]},
            r"caption 1 \(txt: 'B'\) was changed: 3 .* embedded, there are 3",
        ),
        ({"txt": ["a", "b", "x"], "json.captions": ["c"]}, r"caption 2 \(txt: 'x'\) was added: .* there are 4 now"),
        ({"txt": ["a"], "json.captions": ["c"]}, r"caption 1 \(txt\) was removed: 3 .* embedded, 2 are left"),
        ({"txt": ["b", "a"], "json.captions": ["c"]}, r"caption 0 \(txt: 'b'\) was moved: it was caption 1"),
        ({"json.captions": ["c"], "txt": ["a", "b"]}, r"caption 0 \(json.captions: 'c'\) was moved: it was caption 2"),
        ({"txt": ["a"], "json.captions": ["b", "c"]}, r"caption 1 \(json.captions: 'b'\) was changed"),
        ({"txt": ["a", "b", "b"], "json.captions": ["c"]}, r"caption 1 \(txt: 'b'\) was added"),
        ({}, r"caption 0 \(txt\) was removed: 3 captions were embedded, 0 are left"),
    ],
)
def test_what_changed_in_a_sample_is_named(now: CaptionsBySource, message: str, cache: Path) -> None:
    with pytest.raises(ManifestError, match=rf"key '0/0': {message}.*; restore the captions, .* remap`"):
        EmbeddingCache.open(cache).check_captions(0, 0, "0/0", now)


def test_addresses_are_checked(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    reads: list[Callable[..., Any]] = [
        opened.captions,
        opened.caption_rows,
        lambda *at: opened.caption_row(*at, 0),
        lambda tar, ordinal, key: opened.rows([0, tar], [0, ordinal], ["0/0", key], captions=[2, 0]),
        lambda *at: opened.check_captions(*at, {}),
    ]
    for read in reads:
        for at, message in (
            ((0, 0, "0/1"), "the row there is of another key"),
            ((0, 1, "0/1"), "no embedding: no_caption"),
            ((0, 4, "0/4"), "the tar has 4 samples"),
            ((0, -1, "0/3"), "the tar has 4 samples"),
        ):
            with pytest.raises(ManifestError, match=message):
                read(*at)
    with pytest.raises(ManifestError, match=r"ordinal 2: no caption 3: the sample had 3"):
        opened.rows([0, 0], [0, 2], captions=[0, 3])
    with pytest.raises(ManifestError, match=r"ordinal 0: no caption -1"):
        opened.rows([0], [0], captions=[-1])
    for captions in (None, [0, 1]):
        with pytest.raises(ValueError, match=r"captions: .* expected one for each row of text, and none for images"):
            opened.rows([0], [0], captions=captions)
    assert opened.rows([], [], captions=[]).shape == (0, 6)
    assert opened.status(0).tolist() == [RowStatus.OK, RowStatus.NO_CAPTION, RowStatus.OK, RowStatus.OK]
    assert opened.find("0/3") == (0, 3)
    assert opened.find("1/1") == (1, 1)


def test_a_cache_of_the_other_side_is_refused(cache: Path, tmp_path: Path) -> None:
    make_cache(tmp_path, [3], 6)
    with pytest.raises(ManifestError, match=r"expected a cache of image, found one of text \(test:bag\): .*--of image"):
        EmbeddingCache.open(cache, of="image")
    with pytest.raises(ManifestError, match=r"expected a cache of text, found one of image \(timm:b\): .*--of text"):
        EmbeddingCache.open(tmp_path, of="text")
    with pytest.raises(ManifestError, match="found one of text"):
        EmbeddingCache.open(cache).row(0, 0, "0/0")
    images = EmbeddingCache.open(tmp_path)
    for read in (images.captions, images.caption_rows, lambda *at: images.caption_row(*at, 0)):
        with pytest.raises(ManifestError, match="expected a cache of text, found one of image"):
            read(0, 0, "0/0")
    with pytest.raises(ValueError, match=r"captions: \(1,\) for rows of image: expected .* none for images"):
        images.rows([0], [0], captions=[0])
    (of_text,) = stream_rows(EmbeddingCache.open(cache), [0])
    with pytest.raises(ManifestError, match="expected rows of images, found rows of text"):
        of_text.row(0, "0/0")
    (of_images,) = stream_rows(images, [0])
    with pytest.raises(ManifestError, match="expected rows of text, found rows of images"):
        of_images.caption_rows(0, "0/0")


def test_tars_are_streamed_with_their_runs(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    streamed = {rows.tar_id: rows for rows in stream_rows(opened, [2, 0, 1])}
    assert list(streamed) == [2, 0, 1]
    for tar_id, tar in enumerate(SAMPLES):
        rows = streamed[tar_id]
        assert len(rows) == len(tar)
        for ordinal, sample in enumerate(tar):
            key = f"{tar_id}/{ordinal}"
            if not sample:
                assert rows.captions(ordinal, key) is None
                assert rows.caption_row(ordinal, key, 0) is None
                assert rows.caption_rows(ordinal, key) is None
                continue
            found = rows.captions(ordinal, key)
            assert found is not None
            assert found.hash_k.tolist() == opened.captions(tar_id, ordinal, key).hash_k.tolist()
            whole = opened.caption_rows(tar_id, ordinal, key)
            assert np.array_equal(rows.caption_rows(ordinal, key), whole)  # type: ignore[arg-type]
            for number, caption in enumerate(flat(sample)):
                assert np.array_equal(rows.caption_row(ordinal, key, number, caption), whole[number])  # type: ignore[arg-type]
        with pytest.raises(ManifestError, match="the row there is of another key"):
            rows.captions(0, "another")


def test_moments_are_those_of_all_captions(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    rows = np.concatenate([opened.tar(i) for i in range(3)]).astype(np.float64)
    assert len(rows) == 13
    mean, std = opened.moments()
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, rows.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(opened.moments([2, 1])[0], rows[-6:].mean(axis=0), rtol=1e-6)
    with pytest.raises(ManifestError, match="no row has an embedding"):
        opened.moments([1])


def test_a_chunk_is_checked_when_first_touched(tmp_path: Path) -> None:
    make_text_cache(tmp_path, [[{"txt": [f"{k} {i}" for i in range(3)]} for k in range(8)]], 5, "float32")
    path = tmp_path / STORE / "emb/c/0/0"
    data = bytearray(path.read_bytes())
    data[3 * (4 * 5 * 4 + 4) + 17] ^= 64  # a row of the fourth chunk of 4 rows: 12 to 15, of samples 4 and 5
    path.write_bytes(data)
    opened = EmbeddingCache.open(tmp_path)
    with pytest.raises(ManifestError, match=r"rows of tar 0\.tar \(0\) are damaged: .* is not the file that was"):
        opened.tar(0)
    assert np.isfinite(opened.caption_rows(0, 3, "0/3")).all()
    assert np.isfinite(opened.caption_row(0, 5, "0/5", 1)).all()
    for ordinal, number in ((4, 0), (5, 0)):
        with pytest.raises(ManifestError, match=r"rows of tar 0\.tar \(0\) are damaged: .*crc32c of the chunk"):
            opened.caption_row(0, ordinal, f"0/{ordinal}", number)


@pytest.mark.parametrize("name", ["caption_hash", "caption_source", "row_end", "key_hash", "status"])
def test_a_torn_file_is_noticed(name: str, tmp_path: Path) -> None:
    make_text_cache(tmp_path, SAMPLES, 5, sources=SOURCES)
    path = tmp_path / STORE / name / "c/0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"rows of tar 0\.tar \(0\) are damaged: .* is not the file that was"):
        EmbeddingCache.open(tmp_path).captions(0, 0, "0/0")
    path.write_bytes(data[:-1])
    with pytest.raises(ManifestError, match=r"expected \d+ bytes, found \d+"):
        EmbeddingCache.open(tmp_path).captions(0, 0, "0/0")


def read_all(opened: EmbeddingCache, queue: Any) -> None:
    rows = [opened.caption_rows(tar, ordinal, f"{tar}/{ordinal}") for tar, ordinal in ((0, 0), (0, 2), (2, 0))]
    queue.put([float(each.sum()) for each in rows] + [len(rows.shard.rows_nD) for rows in stream_rows(opened, [0, 2])])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_cache_works_in_child_processes(method: str, cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    read_all(opened, queue)
    worker = context.Process(target=read_all, args=(opened, queue))
    worker.start()
    expected, found = (queue.get(timeout=60) for _ in range(2))
    worker.join()
    assert found == expected
    assert len(pickle.dumps(opened)) < 5000


def test_a_remote_cache_is_fetched_a_shard_at_a_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, url = LocalStorage(cache), f"memory://{cache}"
    for name in storage.walk():
        open_storage(url).put(name, storage.read(name), owner="copy")
    local, fetched = EmbeddingCache.open(cache), EmbeddingCache.open(url)
    requests: list[str] = []
    read = type(fetched.storage).read
    monkeypatch.setattr(
        type(fetched.storage),
        "read",
        lambda storage, name, *part: (requests.append(name), read(storage, name, *part))[1],
    )
    for tar, ordinal, number in ((0, 3, 0), (2, 0, 5), (0, 2, 1), (2, 0, 0)):
        at = tar, ordinal, f"{tar}/{ordinal}", number
        assert np.array_equal(fetched.caption_row(*at), local.caption_row(*at))
    for name in ("emb/c/{}/0", "row_end/c/{}", "caption_hash/c/{}"):
        array = name.partition("/")[0]
        found = sorted(request for request in requests if f"/{array}/" in request)
        assert found == [f"{STORE}/{name.format(tar)}" for tar in (0, 2)]


def test_info_tells_what_a_cache_of_text_holds(cache: Path, tmp_path: Path) -> None:
    text = read_info(cache).text()
    for line in (
        "feature   pooled, 6 x float16, captions of up to 8 tokens, pooled by mean",
        "captions  from txt, json.captions\n",
        "computed  in float32 by torch, 1 captions per forward pass",
        "samples   7 of 7: 4 embedded, 3 no caption",
        "rows      13, 3.25 captions a sample",
        "(ordinal 1): no caption",
    ):
        assert line in text, text
    make_text_cache(tmp_path, [[{"txt": ["a"]}]], 6)
    assert "captions  from txt, json.captions or json.caption\n" in read_info(tmp_path).text()
