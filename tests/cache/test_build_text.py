"""A built cache of text has the live encoder's embeddings of all captions, each in its sample's run."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cache.caches import without_times
from tests.cache.caption_tars import CaptionedSample, captioned, runs
from tests.cache.text_encoders import HUGE, MAX_LENGTH, NONFINITE, PROCESS_ENV, ColourGrid, WordBag
from threetowers.cache.builder import tar_reader
from threetowers.cache.builder.build import build_cache, build_caches
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig
from threetowers.cache.encoders.forward_queue import CaptionQueue, RunningBatch
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.format.done_record import DoneRecord, read_done_record
from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError, read_manifest
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.measure_views import measure_views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.captions import DEFAULT_SOURCES, caption_hash
from threetowers.cache.webdataset.defects import BadSample

Pack = Callable[..., Path]
SIZES = (23, 8, 17)
OPTIONS: dict[str, Any] = {"encoder": "test:bag", "of": "text", "device": "cpu", "batch_size": 5, "threads": 1}


def write(path: Path, samples: Sequence[CaptionedSample], pack: Pack) -> Path:
    return pack(path, [(sample.key, sample.members) for sample in samples])


def records(folder: str | Path) -> list[DoneRecord]:
    storage = open_storage(folder)
    manifest = read_manifest(storage)
    return [read_done_record(storage, manifest, entry) for entry in read_table(storage).entries]


def same(found: str | Path, expected: str | Path) -> None:
    """The same files with the same bytes; done records but for time and host; nothing left behind."""
    ours, theirs = open_storage(found), open_storage(expected)
    assert ours.walk() == theirs.walk()
    for name in theirs.walk():
        if not name.startswith("done/"):
            assert ours.read(name) == theirs.read(name), name
    assert [without_times(record) for record in records(found)] == [
        without_times(record) for record in records(expected)
    ]


@pytest.fixture(scope="module")
def samples(encode: Callable[..., bytes], draw: Callable[..., Any]) -> list[list[CaptionedSample]]:
    """The samples of three tars, with images."""
    return [captioned(n, seed, lambda i: encode(draw(i))) for seed, n in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tars(samples: list[list[CaptionedSample]], pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("captioned")
    return [write(root / f"{i}.tar", each, pack) for i, each in enumerate(samples)]


@pytest.fixture(scope="module")
def cache(tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "cache"
    build_cache(BuildConfig(tars=tars, output_dir=out, **OPTIONS))
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("feature", ["pooled", "projected"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_every_caption_has_the_live_encoder_s_embedding(
    dtype: Any, feature: str, batch_size: int, samples: list[list[CaptionedSample]], tars: list[Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"dtype": dtype, "feature": feature, "batch_size": batch_size}
    report = build_cache(BuildConfig(tars=tars, output_dir=tmp_path, **options))
    text = load_frozen_encoder("test:bag").side("text")
    for tar_id, tar in enumerate(samples):
        found, status = runs(tmp_path, tar_id, len(tar))
        for run, state, sample in zip(found, status, tar, strict=True):
            assert state == (RowStatus.OK if sample.captions else RowStatus.NO_CAPTION)
            expected = [(caption, source) for source, captions in sample.captions.items() for caption in captions]
            assert [row.caption_hash for row in run] == [caption_hash(caption) for caption, _ in expected]
            assert [DEFAULT_SOURCES[row.source] for row in run] == [source for _, source in expected]
            for row, (caption, _) in zip(run, expected, strict=True):
                live_D = text.embed([caption], feature)[0].numpy()
                cosine = row.embedding_D @ live_D / np.linalg.norm(row.embedding_D) / np.linalg.norm(live_D)
                assert cosine >= storage_dtype(dtype).min_cosine
    every = [[c for found in sample.captions.values() for c in found] for tar in samples for sample in tar]
    assert report.samples == sum(SIZES)
    assert report.ok == sum(bool(captions) for captions in every)
    assert report.counts == {"no_caption": report.samples - report.ok}
    assert report.captions == sum(map(len, every))
    assert report.notes == {"json.captions: empty": sum(i % 8 == 3 for n in SIZES for i in range(n))}
    in_tars = [{c for sample in tar for found in sample.captions.values() for c in found} for tar in samples]
    assert report.different_captions == sum(map(len, in_tars)) < report.captions


def test_equal_captions_are_embedded_once_and_sorted_by_length(
    samples: list[list[CaptionedSample]], tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    start = CaptionQueue.start

    def counted(self: CaptionQueue, tokens: Sequence[Tokens]) -> RunningBatch:
        batches.append([len(each.ids) for each in tokens])
        return start(self, tokens)

    monkeypatch.setattr(CaptionQueue, "start", counted)
    out = [tmp_path / "pooled", tmp_path / "projected"]
    both = OPTIONS | {"feature": ["pooled", "projected"]}
    build_caches(BuildConfig(tars=tars[:1], output_dir=out, **both))
    different = {caption for sample in samples[0] for found in sample.captions.values() for caption in found}
    assert sum(map(len, batches)) == len(different)
    embedded = [length for batch in batches for length in batch]
    assert embedded == sorted(embedded, reverse=True)
    assert all(len(batch) <= 5 for batch in batches)


def test_what_is_built_beside_it_changes_no_byte(
    samples: list[list[CaptionedSample]], tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of a model, two features of each, and another encoder of text, in one reading."""
    sources = [
        ("test:pair", "image", "pooled"),
        ("test:pair", "text", "projected"),
        ("test:pair", "image", "projected"),
        ("test:pair", "text", "pooled"),
        ("test:bag:seed:1", "text", "pooled"),
    ]
    alone = []
    for i, (encoder, of, feature) in enumerate(sources):
        alone.append(tmp_path / f"alone-{i}")
        options = OPTIONS | {"encoder": encoder, "of": of, "feature": feature}
        build_cache(BuildConfig(tars=tars, output_dir=alone[-1], **options))

    opened = []
    real = tar_reader.open_object
    monkeypatch.setattr(tar_reader, "open_object", lambda path: opened.append(path) or real(path))
    passes = []
    forward = ColourGrid.forward
    monkeypatch.setattr(
        ColourGrid, "forward", lambda self, x, features: passes.append(len(x)) or forward(self, x, features)
    )
    together = [tmp_path / f"together-{i}" for i in range(len(sources))]
    columns = dict(zip(("encoder", "of", "feature"), map(list, zip(*sources, strict=True)), strict=True))
    reports = build_caches(BuildConfig(tars=tars, output_dir=together, **OPTIONS | columns))
    assert sorted(opened) == sorted(map(str, tars)), "each tar is read once"
    assert sum(size for size in passes if size > 1) == sum(SIZES), "and each image, but for what finds out widths"
    for ours, theirs in zip(together, alone, strict=True):
        same(ours, theirs)
    assert [report.of for report in reports] == [of for _, of, _ in sources]
    assert [report.captions > 0 for report in reports] == [of == "text" for _, of, _ in sources]


def test_of_a_tar_only_the_text_is_read(tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    real = tar_reader.open_object

    class Counting:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def read(self, size: int = -1) -> bytes:
            nonlocal read
            data: bytes = self._file.read(size)
            read += len(data)
            return data

    monkeypatch.setattr(tar_reader, "open_object", lambda path: Counting(real(path)))
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path, **OPTIONS))
    headers = 512 * 3 * sum(SIZES) + len(tars) * 11_000  # and the padding at the end
    assert read < headers + 200 * sum(SIZES) < sum(path.stat().st_size for path in tars)


def test_tars_without_an_image_are_no_fault(samples: list[list[CaptionedSample]], pack: Pack, tmp_path: Path) -> None:
    bare = [sample._replace(members={k: v for k, v in sample.members.items() if k != "png"}) for sample in samples[0]]
    tars = [write(tmp_path / "bare.tar", bare, pack), pack(tmp_path / "images.tar", [("a", {"png": b"not read"})])]
    report = build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "cache", **OPTIONS))
    assert (report.tars_built, report.samples) == (2, SIZES[0] + 1)
    record = next(record for record in records(tmp_path / "cache") if record.n_samples == 1)
    assert (record.n_rows, record.n_ok, record.counts) == (0, 0, {"no_caption": 1})
    assert "no caption; found members ['png'], expected a caption in txt" in record.bad[0].reason


def test_captions_that_are_too_long_are_cut_and_counted(pack: Pack, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(MAX_LENGTH + 2)]
    captions = [" ".join(words[:n]) for n in (1, MAX_LENGTH, MAX_LENGTH + 1, MAX_LENGTH + 2)]
    tar = pack(tmp_path / "x.tar", [(str(i), {"txt": caption.encode()}) for i, caption in enumerate(captions)])
    report = build_cache(BuildConfig(tars=[tar], output_dir=tmp_path / "cache", **OPTIONS))
    assert (report.ok, report.notes) == (4, {f"a caption cut to {MAX_LENGTH} tokens": 2})
    found, _ = runs(tmp_path / "cache", 0, 4)
    rows = [run[0] for run in found]
    assert len({row.caption_hash for row in rows}) == 4, "the hash is that of the whole caption"
    np.testing.assert_array_equal(rows[1].embedding_D, rows[2].embedding_D)
    shorter = OPTIONS | {"max_length": 1}
    assert build_cache(BuildConfig(tars=[tar], output_dir=tmp_path / "short", **shorter)).notes == {
        "a caption cut to 1 tokens": 3
    }
    assert read_manifest(open_storage(tmp_path / "short")).text.max_length == 1  # type: ignore[union-attr]


def test_sources_and_lines_and_a_prompt(pack: Pack, tmp_path: Path) -> None:
    members = {"cap": b"one\n\ntwo\n", "txt": b"three", "json": b'{"long": ["four", "five"], "caption": "six"}'}
    tar = pack(tmp_path / "x.tar", [("a", members), ("b", {"txt": b"seven"}), ("c", {"cap": b"\xff\xfe\x00"})])
    options = OPTIONS | {"captions": ["json.long", "cap", "txt"], "caption_per_line": True, "prompt": "a photo of "}
    report = build_cache(BuildConfig(tars=[tar], output_dir=tmp_path / "cache", **options))
    assert report.counts == {"no_caption": 1}
    found, _ = runs(tmp_path / "cache", 0, 3)
    text = load_frozen_encoder("test:bag").side("text")
    expected = [[("four", 0), ("five", 0), ("one", 1), ("two", 1), ("three", 2)], [("seven", 2)], []]
    for run, captions in zip(found, expected, strict=True):
        assert [(row.caption_hash, row.source) for row in run] == [
            (caption_hash(caption), source) for caption, source in captions
        ]
        for row, (caption, _) in zip(run, captions, strict=True):
            live_D = text.embed([f"a photo of {caption}"])[0].numpy()
            np.testing.assert_allclose(row.embedding_D, live_D, rtol=2e-3, atol=2e-3)
    manifest = read_manifest(open_storage(tmp_path / "cache"))
    assert manifest.captions is not None
    assert (manifest.captions.sources, manifest.captions.caption_per_line) == (("json.long", "cap", "txt"), True)
    assert "cap" not in "".join(report.ignored), "what was read is not reported as ignored"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "query: "}, "text.prompt: expected , found query: "),
        ({"max_length": 5}, "text.max_length: expected 8, found 5"),
        ({"captions": ["txt"]}, r"captions.sources: expected \(\), found \('txt',\)"),
        ({"caption_per_line": True}, "captions.caption_per_line: expected False, found True"),
        ({"encoder": "test:bag:seed:1"}, "weights_digest: expected"),
        ({"encoder": "test:pair"}, "encoder: expected test:bag, found test:pair"),
        ({"feature": "projected"}, "feature: expected pooled, found projected"),
        ({"of": "image", "encoder": "test:pair"}, "of: expected text, found image"),
        ({"dtype": "int8"}, "dtype: expected float16, found int8"),
        ({"rows_per_tar": 10**6}, "rows_per_tar: expected"),
    ],
)
def test_another_cache_is_refused(
    change: dict[str, Any], message: str, tars: list[Path], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=message):
        build_cache(BuildConfig(tars=tars, output_dir=cache, **OPTIONS | change))


def test_another_tokenizer_or_pooling_is_refused(
    tars: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = WordBag.__init__
    for field, value in (("tokenizer_digest", "words modulo 996"), ("pooling", "last"), ("normalize", True)):

        def init(self: WordBag, *arguments: Any, field: str = field, value: Any = value) -> None:
            real(self, *arguments)
            self.processing = replace(self.processing, **{field: value})

        monkeypatch.setattr(WordBag, "__init__", init)
        with pytest.raises(ManifestError, match=f"text.{field}: expected .*, found {value}"):
            build_cache(BuildConfig(tars=tars, output_dir=cache, **OPTIONS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "image"}, "test:bag has no image side: choose an encoder that has one, or use --of text"),
        ({"feature": "cls"}, "expected one of pooled, projected, found 'cls'"),
        ({"of": "image", "encoder": "test:pair", "prompt": "a "}, r"--prompt: expected a cache of text \(--of text\)"),
        ({"of": "image", "encoder": "test:pair", "captions": ["txt"]}, "--captions: expected a cache of text"),
        ({"captions": ["txt=2"]}, "--captions: found 'txt=2', expected SOURCE: .* weights are a run's"),
        ({"captions": ["txt", "txt"]}, "--captions: .*each once"),
        ({"captions": ["jpg"]}, "--captions: found 'jpg'"),
        ({"max_length": 0}, "--max-length 0: expected at least 1"),
        ({"rows_per_tar": 0}, "--rows-per-tar 0: expected at least 1"),
        ({"of": "image", "encoder": "test:pair", "rows_per_tar": 9}, "--rows-per-tar 9: .* a cache of text"),
        ({"captions": ["cap"]}, r"none of the samples that were looked at has a caption; the first: .*0\.tar: sample"),
        ({"runtime": "onnx"}, "--runtime onnx: expected a cache of images"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, tars: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "cache", **OPTIONS | change))
    assert not (tmp_path / "cache").exists()


def test_an_encoder_without_a_text_side_is_named(
    tars: list[Path], tiny_encoder: Callable[..., str], tmp_path: Path
) -> None:
    options = OPTIONS | {"encoder": tiny_encoder("test_vit@64")}
    with pytest.raises(ValueError, match=r"timm:test_vit has no text side: choose .*, or use --of image"):
        build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "cache", **options))
    assert not (tmp_path / "cache").exists()


def test_what_is_measured_on_images_is_refused_for_captions(tars: list[Path]) -> None:
    with pytest.raises(ValueError, match="--of text: expected --of image, what is measured here are images"):
        measure_views(EmbeddingConfig(tars=tars, **OPTIONS))


def test_more_captions_than_a_tar_has_room_for_are_one_message(pack: Pack, tmp_path: Path) -> None:
    few = pack(tmp_path / "0.tar", [(str(i), {"txt": b"a"}) for i in range(20)])
    many = [(str(i), {"json": ('{"captions": [' + ", ".join(['"b"'] * 90) + "]}").encode()}) for i in range(20)]
    out = tmp_path / "cache"
    build_cache(BuildConfig(tars=[few], output_dir=out, **OPTIONS))
    tars = [few, pack(tmp_path / "1.tar", many)]
    with pytest.raises(ManifestError, match=r"1\.tar: 90 captions in the first 1 samples, .*\(--rows-per-tar\)"):
        build_cache(BuildConfig(tars=tars, output_dir=out, **OPTIONS))
    roomy = OPTIONS | {"rows_per_tar": 1800}
    assert build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "roomy", **roomy)).captions == 1820
    assert build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "all", **OPTIONS)).captions == 1820


def test_nonfinite_and_huge_captions_reject_their_samples(pack: Pack, tmp_path: Path) -> None:
    captions = [["a dog"], ["a dog", f"a {NONFINITE} dog"], [f"{HUGE} dog"], ["a dog", "a cat"]]
    rows = [(str(i), {"json": ('{"captions": ["' + '", "'.join(c) + '"]}').encode()}) for i, c in enumerate(captions)]
    tar = pack(tmp_path / "x.tar", rows)
    report = build_cache(BuildConfig(tars=[tar], output_dir=tmp_path / "cache", **OPTIONS))
    assert (report.ok, report.counts, report.captions) == (2, {"non_finite": 2}, 3)
    found, status = runs(tmp_path / "cache", 0, 4)
    assert [len(run) for run in found] == [1, 0, 0, 2]
    assert status == [RowStatus.OK, RowStatus.NON_FINITE, RowStatus.NON_FINITE, RowStatus.OK]
    reasons = [bad.reason for _, bad in report.bad]
    assert "embedding is nonfinite" in reasons[0]
    assert "overflows float16" in reasons[1]
    wide = OPTIONS | {"dtype": "float32"}
    assert build_cache(BuildConfig(tars=[tar], output_dir=tmp_path / "wide", **wide)).counts == {"non_finite": 1}


def test_on_bad_error_stops_at_a_sample_without_a_caption(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = tar_reader.open_object

    def open_object(path: str) -> Any:
        opened.append(real(path))
        return opened[-1]

    monkeypatch.setattr(tar_reader, "open_object", open_object)
    with pytest.raises(BadSample, match=r"0\.tar: sample '0/0004' .*no caption \(json\.caption: null\).*--on-bad skip"):
        build_cache(BuildConfig(tars=tars, output_dir=tmp_path, **OPTIONS, on_bad="error"))
    assert opened
    assert all(file.closed for file in opened), "also those that were opened ahead"


def test_a_second_run_keeps_what_is_finished(tars: list[Path], cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    (folder / "done/1.json").unlink()
    (folder / "store.zarr/row_end/c/2").write_bytes(b"cut short")
    report = build_cache(BuildConfig(tars=tars, output_dir=folder, **OPTIONS))
    assert (report.tars_built, report.tars_kept, report.samples) == (2, 1, SIZES[1] + SIZES[2])
    same(folder, cache)


def test_readers_and_verify_agree_with_it(samples: list[list[CaptionedSample]], tars: list[Path], cache: Path) -> None:
    opened = EmbeddingCache.open(cache, of="text")
    for tar_id, tar in enumerate(samples):
        found, _ = runs(cache, tar_id, len(tar))
        for ordinal, (run, sample) in enumerate(zip(found, tar, strict=True)):
            if run:
                rows_kD = opened.caption_rows(tar_id, ordinal, sample.key)
                np.testing.assert_array_equal(rows_kD, [row.embedding_D for row in run])
    report = verify(cache, list(map(str, tars)), depth="recompute", check_contents=True)
    assert report.ok, report.text()
    assert not report.warnings, report.text()


def test_tars_are_added_later(tars: list[Path], cache: Path, tmp_path: Path) -> None:
    room = read_manifest(open_storage(cache))
    options = OPTIONS | {"samples_per_tar": room.samples_per_tar, "rows_per_tar": room.rows_per_tar}
    build_cache(BuildConfig(tars=tars[:2], output_dir=tmp_path / "cache", **options))
    report = build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "cache", **OPTIONS))
    assert (report.tars_built, report.tars_kept) == (1, 2)
    for tar_id, n in enumerate(SIZES):
        ours, theirs = (runs(folder, tar_id, n)[0] for folder in (tmp_path / "cache", cache))
        assert [[row.caption_hash for row in run] for run in ours] == [
            [row.caption_hash for row in run] for run in theirs
        ]
        for a, b in zip(chain(*ours), chain(*theirs), strict=True):
            np.testing.assert_array_equal(a.embedding_D, b.embedding_D)


def test_a_cache_in_a_bucket_equals_one_in_a_folder(tars: list[Path], cache: Path, bucket: str) -> None:
    remote = open_storage(f"{bucket}/captioned")
    for path in tars:
        remote.put(path.name, path.read_bytes(), owner="t")
    out = f"{bucket}/caches/text"
    urls = [f"{bucket}/captioned/{path.name}" for path in tars]
    assert build_cache(BuildConfig(tars=urls, output_dir=out, **OPTIONS)).tars_built == len(tars)
    ours, theirs = records(out), records(cache)
    assert [record.files for record in ours] == [record.files for record in theirs]
    assert build_cache(BuildConfig(tars=urls, output_dir=out, **OPTIONS)).tars_kept == len(tars)


def test_the_command_says_what_it_did(
    samples: list[list[CaptionedSample]], tars: list[Path], cache: Path, tmp_path: Path
) -> None:
    flags = ["--encoder", "test:bag", "--of", "text", "--batch-size", "5", "--threads", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "threetowers", "cache", "build", "--tars", *map(str, tars)]
    result = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "cache"), *flags],
        env=PROCESS_ENV | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    same(tmp_path / "cache", cache)
    rows = sum(record.n_rows for record in records(cache))
    read = sum(len({c for sample in tar for found in sample.captions.values() for c in found}) for tar in samples)
    assert read < rows
    assert f"embedded with {rows} captions, of which the encoder read {read} (equal ones" in result.stdout
    assert "captions/s" in result.stdout
    assert "noted     " in result.stdout
    assert "no caption (json.caption: null); found members" in result.stdout


def test_bfloat16_passes_are_close_to_float32(tars: list[Path], cache: Path, tmp_path: Path) -> None:
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path, **OPTIONS, precision="bfloat16"))
    assert read_manifest(open_storage(tmp_path)).precision == "bfloat16"
    ours, theirs = (runs(folder, 0, SIZES[0])[0] for folder in (tmp_path, cache))
    for a, b in zip(chain(*ours), chain(*theirs), strict=True):
        cosine = torch.cosine_similarity(torch.tensor(a.embedding_D), torch.tensor(b.embedding_D), dim=0)
        assert cosine > 0.999
