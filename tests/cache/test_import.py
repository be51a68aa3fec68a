"""Embeddings of other tools become a cache that verify proves, and a cache becomes their files."""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from tests.cache.caches import without_times
from tests.cache.caption_tars import CaptionedSample, captioned
from tests.cache.text_encoders import PROCESS_ENV
from threetowers.cache import cli as command
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.live import embed, embed_captions
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.exchange import source_rows
from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.exporter import export_cache
from threetowers.cache.exchange.import_config import ImportConfig
from threetowers.cache.exchange.importer import ImportReport, import_cache
from threetowers.cache.format.dtypes import cosines
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError, Side
from threetowers.cache.info import read_info
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import decode_rgb

Pack = Callable[..., Path]
Rows = dict[str, np.ndarray]  # (D,) of each key or caption
SIZES = (9, 1, 6)
ENCODER = "test:pair"


@pytest.fixture(scope="module")
def samples(encode: Callable[..., bytes], draw: Callable[..., Any]) -> list[list[CaptionedSample]]:
    return [captioned(n, seed, lambda i: encode(draw(i))) for seed, n in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tars(samples: list[list[CaptionedSample]], pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tars")
    return [pack(folder / f"{i}.tar", [(s.key, s.members) for s in tar]) for i, tar in enumerate(samples)]


@pytest.fixture(scope="module")
def raw(samples: list[list[CaptionedSample]]) -> dict[Side, Rows]:
    """The projected embedding of each image by its key, and of each caption."""
    encoder = load_frozen_encoder(ENCODER)
    every = [sample for tar in samples for sample in tar]
    image = encoder.side("image")
    pixels = [np.asarray(image.transform(decode_rgb(sample.members["png"], max_pixels=10**6))) for sample in every]
    captions = sorted({caption for sample in every for found in sample.captions.values() for caption in found})
    return {
        "image": dict(zip([sample.key for sample in every], embed(image, pixels, "projected"), strict=True)),
        "text": dict(zip(captions, embed_captions(encoder.side("text"), captions, "projected"), strict=True)),
    }


def shuffled(rows: Rows, seed: int = 0) -> tuple[list[str], np.ndarray]:
    keys = np.random.default_rng(seed).permutation(sorted(rows)).tolist()
    return keys, np.stack([rows[key] for key in keys])


def write_clip_folder(folder: Path, of: Side, keys: Sequence[str], rows_nD: np.ndarray, sizes: Sequence[int]) -> Path:
    """A folder as clip-retrieval writes it: unit norm, float16, parts of so many rows, captions as they lie in tars."""
    name, column = {"image": ("img_emb", "image_path"), "text": ("text_emb", "caption")}[of]
    (folder / name).mkdir(parents=True)
    (folder / "metadata").mkdir()
    unit_nD = (rows_nD / np.linalg.norm(rows_nD, axis=1, keepdims=True)).astype(np.float16)
    ends = np.cumsum([0, *sizes])
    assert ends[-1] == len(keys)
    for part in range(len(sizes)):
        here = slice(ends[part], ends[part + 1])
        np.save(folder / name / f"{name}_{part:02}.npy", unit_nD[here])
        values = [f" {key}\n" for key in keys[here]] if of == "text" else list(keys[here])
        table = pyarrow.table({column: values, "width": [40] * len(values)})
        parquet.write_table(table, folder / "metadata" / f"metadata_{part:02}.parquet")
    return folder


def write_pair(folder: Path, keys: Sequence[str], rows_nD: np.ndarray, kind: str = "txt", name: str = "a") -> dict:
    """A matrix and its keys, as the options of an import."""
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{name}.npy", rows_nD)
    path = folder / f"{name}_keys.{kind}"
    if kind == "txt":
        path.write_text("".join(f"{key}\n" for key in keys), newline="\n")
    elif kind == "npy":
        np.save(path, np.array(keys))
    else:
        parquet.write_table(pyarrow.table({"uid": keys}), path)
    return {"rows": [folder / f"{name}.npy"], "keys": [path], "key_column": "uid" if kind == "parquet" else None}


def run(tars: Sequence[Path], out: Path, **options: Any) -> ImportReport:
    return import_cache(ImportConfig(tars=tars, output_dir=out, **({"encoder": ENCODER} | options)))


def rows_of(out: Path, samples: list[list[CaptionedSample]], of: Side) -> Rows:
    """The row of each key, or of each caption that has one, as a reader finds it."""
    cache = EmbeddingCache.open(out, of=of)
    found: Rows = {}
    for tar_id, tar in enumerate(samples):
        for ordinal, sample in enumerate(tar):
            if cache.status(tar_id)[ordinal] != RowStatus.OK:
                continue
            if of == "image":
                found[sample.key] = cache.row(tar_id, ordinal, sample.key)
                continue
            captions = [caption for each in sample.captions.values() for caption in each]
            for number, caption in enumerate(captions):
                found[caption] = cache.caption_row(tar_id, ordinal, sample.key, number, caption)
    return found


def same_rows(found: Rows, expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, row_D in expected.items():
        assert np.array_equal(found[key], row_D.astype(np.float16).astype(np.float32)), key


@pytest.mark.parametrize("of", ["image", "text"])
def test_a_folder_of_clip_retrieval_becomes_a_cache(
    of: Side, tars: list[Path], samples: list[list[CaptionedSample]], raw: dict[Side, Rows], tmp_path: Path
) -> None:
    keys, rows_nD = shuffled(raw[of])
    folder = write_clip_folder(tmp_path / "clip", of, keys, rows_nD, (5, len(keys) - 7, 2))
    options: dict[str, Any] = {"encoder": ENCODER, "of": of, "feature": "unit:projected"}
    report = run(tars, tmp_path / "cache", clip_retrieval=folder, **options)
    empty = sum(not sample.captions for tar in samples for sample in tar) if of == "text" else 0
    assert (report.tars, report.samples, report.ok) == (3, 16, 16 - empty)
    assert (report.rows, report.used, report.unmatched, report.repeated) == (len(keys), len(keys), 0, 0)
    unit_nD = rows_nD / np.linalg.norm(rows_nD, axis=1, keepdims=True)
    same_rows(rows_of(tmp_path / "cache", samples, of), dict(zip(keys, unit_nD, strict=True)))

    # The rows are those of a build, whose manifest this is but for what is not known.
    checked = verify(tmp_path / "cache", tars, depth="recompute", check_contents=True)
    assert checked.ok, checked.text()
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "built", device="cpu", **options))
    built = rows_of(tmp_path / "built", samples, of)
    found = rows_of(tmp_path / "cache", samples, of)
    assert all(np.abs(built[key] - found[key]).max() < 1e-3 for key in built)
    assert build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "cache", device="cpu", **options)).tars_kept == 3
    text = read_info(tmp_path / "cache").text()
    assert "versions  not known" in text
    assert "computed  in float32 by torch\n" in text, "no batch size: there was none"
    assert "tars      whose rows were not computed here: 3 by import" in text


@pytest.mark.parametrize("kind", ["txt", "npy", "parquet"])
@pytest.mark.parametrize("of", ["image", "text"])
def test_matrices_with_keys_become_a_cache(
    of: Side, kind: str, tars: list[Path], samples: list[list[CaptionedSample]], raw: dict[Side, Rows], tmp_path: Path
) -> None:
    """Raw rows in float32 and float64, in two matrices."""
    keys, rows_nD = shuffled(raw[of])
    first = write_pair(tmp_path / "m", keys[:4], rows_nD[:4], kind, "b")
    second = write_pair(tmp_path / "m", keys[4:], rows_nD[4:].astype(np.float64), kind, "a")
    both = {name: first[name] + second[name] for name in ("rows", "keys")} | {"key_column": first["key_column"]}
    report = run(tars, tmp_path / "cache", of=of, feature="projected", **both)
    assert (report.used, report.unmatched) == (len(keys), 0)
    same_rows(rows_of(tmp_path / "cache", samples, of), raw[of])
    assert verify(tmp_path / "cache", tars, depth="recompute").ok


def test_images_are_found_by_the_names_of_files(
    tars: list[Path], samples: list[list[CaptionedSample]], raw: dict[Side, Rows], pack: Pack, tmp_path: Path
) -> None:
    keys, rows_nD = shuffled(raw["image"])
    named = [(f"x/{s.key.replace('/', '_')}", {"png": s.members["png"]}) for tar in samples for s in tar]
    renamed = [pack(tmp_path / "0.tar", named)]
    paths = [f"/images/{i}/{key.replace('/', '_')}.jpg" for i, key in enumerate(keys)]
    pair = write_pair(tmp_path / "m", paths, rows_nD)
    with pytest.raises(
        BadSource, match=r"none of 16 rows .* has '/images/0/.*\.jpg', the first sample has the key 'x/"
    ):
        run(renamed, tmp_path / "cache", feature="projected", **pair)
    assert not (tmp_path / "cache").exists()
    run(renamed, tmp_path / "cache", feature="projected", match="name", **pair)
    assert verify(tmp_path / "cache", renamed, depth="recompute").ok
    with pytest.raises(BadSource, match=r"row \d+ of .*a\.npy goes with another sample too"):
        run([*renamed, pack(tmp_path / "1.tar", [named[3]])], tmp_path / "b", feature="projected", match="name", **pair)


@pytest.mark.parametrize("of", ["image", "text"])
def test_what_finds_no_partner_is_counted(
    of: Side,
    tars: list[Path],
    samples: list[list[CaptionedSample]],
    raw: dict[Side, Rows],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys, rows_nD = shuffled(raw[of])
    lost, kept = keys[0], keys[1:]
    stored = [*kept, kept[0], "of no sample"]
    pair = write_pair(tmp_path / "m", stored, np.concatenate([rows_nD[1:], rows_nD[1:2] * 1.001, rows_nD[:1]]))
    options: dict[str, Any] = {"of": of, "feature": "projected"} | pair
    report = run(tars, tmp_path / "cache", **options)
    usable = [s for tar in samples for s in tar if of == "image" or s.captions]
    without = sum(
        lost == s.key if of == "image" else any(lost in found for found in s.captions.values()) for s in usable
    )
    assert report.counts["filtered"] == without > 0
    assert report.samples == 16 == report.ok + sum(report.counts.values())
    assert report.repeated == 1
    assert report.unused_names[0] == f"row {len(keys)} of {pair['rows'][0]}" or of == "text"
    assert report.rows == report.used + report.repeated + report.unmatched
    assert "imported: no row of " in report.text()
    found = rows_of(tmp_path / "cache", samples, of)
    same_rows(found, {key: row for key, row in raw[of].items() if key in found})
    assert lost not in found
    assert verify(tmp_path / "cache", tars, depth="recompute", check_contents=True).ok

    # Other policies, and again.
    with pytest.raises(ManifestError, match=rf"{without if of == 'image' else ''}.* have no row: .*--missing filtered"):
        run(tars, tmp_path / "strict", missing="error", **options)
    left = run(tars, tmp_path / "left", missing="build", **options)
    assert len(left.left) >= 1
    assert left.tars == 3 - len(left.left)
    build = {name: options[name] for name in ("of", "feature")}
    built = build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "left", encoder=ENCODER, device="cpu", **build))
    assert built.tars_built == len(left.left)
    assert verify(tmp_path / "left", tars, depth="recompute").ok
    again = run(tars, tmp_path / "cache", **options)
    assert (again.tars, again.kept, again.used) == (0, 3, report.used)
    config = ImportConfig(tars=tars, output_dir=tmp_path / "cache", encoder=ENCODER, **options)
    assert command.import_(config) == 0
    assert f"{report.rows} rows: {report.used} used, {report.unmatched} of no sample" in capsys.readouterr().out


def test_samples_that_cannot_be_used_keep_their_own_status(raw: dict[Side, Rows], pack: Pack, tmp_path: Path) -> None:
    key, row_D = next(iter(raw["image"].items()))
    caption, caption_D = next(iter(raw["text"].items()))
    members = {"txt": caption.encode(), "png": b"never decoded"}
    bad = [("none", {"cls": b"1"}), (key, members), ("nan", {"png": b"i", "txt": b"nan"})]
    tar = [pack(tmp_path / "0.tar", bad)]
    nan_D = np.full_like(row_D, np.nan)
    for of, first, first_D in (("image", key, row_D), ("text", caption, caption_D)):
        pair = write_pair(tmp_path / f"{of}-m", [first, "nan", "none"], np.stack([first_D, nan_D, first_D]))
        report = run(tar, tmp_path / of, of=of, feature="projected", **pair)
        assert (report.ok, report.used, report.unmatched) == (1, 2, 1)
        lacks = "no_image" if of == "image" else "no_caption"
        assert report.counts == {lacks: 1, "non_finite": 1}
        assert "nan (ordinal 2): " in report.text()
        assert "embedding is nonfinite" in report.text()
        with pytest.raises(BadSample, match=r"0\.tar: (sample|.*) 'none'.*--on-bad skip"):
            run(tar, tmp_path / f"{of}-strict", of=of, feature="projected", on_bad="error", **pair)


def test_verify_finds_rows_of_another_encoder(tars: list[Path], raw: dict[Side, Rows], tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "m", *shuffled(raw["image"]))
    run(tars, tmp_path / "cache", encoder=f"{ENCODER}:seed:1", feature="projected", **pair)
    assert verify(tmp_path / "cache", tars).ok
    report = verify(tmp_path / "cache", tars, depth="recompute", weights="seed:1")
    assert "cosine with the recomputed row" in report.text()


def break_pair(what: str, folder: Path, rows: Rows) -> dict[str, Any]:
    """A source of images with one fault."""
    keys, rows_nD = shuffled(rows)
    if what == "two values":
        return write_pair(folder, [*keys, keys[3]], np.concatenate([rows_nD, rows_nD[:1]]))
    if what == "widths":
        a, b = write_pair(folder, keys, rows_nD), write_pair(folder, ["z"], rows_nD[:1, :5], name="b")
        return {name: a[name] + b[name] for name in ("rows", "keys")}
    options = write_pair(folder, keys, rows_nD)
    match what:
        case "fewer rows":
            np.save(options["rows"][0], rows_nD[:-2])
        case "width":
            np.save(options["rows"][0], rows_nD[:, :5])
        case "vector":
            np.save(options["rows"][0], rows_nD[0])
        case "integers":
            np.save(options["rows"][0], rows_nD.astype(np.int32))
        case "pickle":
            np.save(options["rows"][0], np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "torn":
            options["rows"][0].write_bytes(options["rows"][0].read_bytes()[:-8])
        case "absent":
            options["rows"][0].unlink()
        case "no keys":
            options["keys"] = [folder / "nothing.txt"]
        case "not text":
            options["keys"][0].write_bytes(b"\xff\xfe\x00")
        case "too few files":
            options["keys"] = options["keys"] * 2
        case "unit":
            np.save(options["rows"][0], rows_nD / np.linalg.norm(rows_nD, axis=1, keepdims=True))
        case "not unit":
            options["feature"] = "unit:projected"
        case "null":
            path = folder / "null.parquet"
            parquet.write_table(pyarrow.table({"key": [None, *keys[1:]]}), path)
            options["keys"] = [path]
        case "column":
            path = folder / "column.parquet"
            parquet.write_table(pyarrow.table({"id": keys}), path)
            options["keys"] = [path]
        case "not parquet":
            path = folder / "text.parquet"
            path.write_text("a\n")
            options["keys"] = [path]
    return options


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("two values", r"row \d+ of .*a\.npy and row 16 of .*a\.npy: two different embeddings of one key"),
        ("widths", r"b\.npy: rows of width 5, expected 12 as in .*a\.npy"),
        ("fewer rows", r"a\.npy: 14 rows, expected one for each of the 16 keys in .*a_keys\.txt"),
        ("width", r"rows of width 5, expected 12, that of 'projected' of test:pair \(pooled 24, projected 12\)"),
        ("vector", r"expected a matrix of floats, found float32 of shape \(12,\)"),
        ("integers", r"expected a matrix of floats, found int32"),
        ("pickle", r"a\.npy: not an \.npy file that can be read"),
        ("torn", r"a\.npy: not an \.npy file that can be read"),
        ("absent", r"a\.npy: no such file"),
        ("no keys", r"nothing\.txt: no such file"),
        ("not text", r"expected UTF-8 with a key on each line"),
        ("too few files", r"1 --rows, 2 --keys: expected a file of keys for each matrix"),
        ("unit", r"rows of unit norm, where 'projected' of test:pair has the norm .*--feature unit:projected"),
        ("not unit", r"rows that do not have unit norm, where 'unit:projected' of test:pair has"),
        ("null", r"null\.parquet: row 0: expected text, found None"),
        ("column", r"expected a column 'key', found id: name another \(--key-column\)"),
        ("not parquet", r"text\.parquet: not a Parquet file"),
    ],
)
def test_bad_sources_are_refused_in_one_message(
    what: str, message: str, tars: list[Path], raw: dict[Side, Rows], tmp_path: Path
) -> None:
    options = {"feature": "projected"} | break_pair(what, tmp_path / "m", raw["image"])
    with pytest.raises(BadSource, match=message):
        run(tars, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_part_without_one_of_its_files_is_refused(tars: list[Path], raw: dict[Side, Rows], tmp_path: Path) -> None:
    keys, rows_nD = shuffled(raw["image"])
    folder = write_clip_folder(tmp_path / "clip", "image", keys, rows_nD, (6, 6, 4))
    options: dict[str, Any] = {"clip_retrieval": folder, "feature": "unit:projected"}
    with pytest.raises(BadSource, match=r"clip: text_emb.*|text_emb_00\.npy: no such file, and 3 of 3 parts"):
        run(tars, tmp_path / "cache", of="text", **options)
    (folder / "metadata/metadata_01.parquet").unlink()
    with pytest.raises(BadSource, match=r"metadata_01\.parquet: no such file, and 1 of 3 parts are like it"):
        run(tars, tmp_path / "cache", **options)
    with pytest.raises(BadSource, match=r"expected img_emb/img_emb_0\.npy, \.\.\. and metadata/metadata_0\.parquet"):
        run(tars, tmp_path / "cache", clip_retrieval=tmp_path, feature="projected")


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tars": ["a.tar"], "output_dir": tmp_path, "encoder": ENCODER}
    pair: dict[str, Any] = {"rows": [Path("a")], "keys": [Path("b")]}
    with pytest.raises(
        ValueError, match=r"expected --clip-retrieval FOLDER, or --rows with --keys, or --datacompdr TARS, found none"
    ):
        ImportConfig(**options)
    with pytest.raises(ValueError, match="found --clip-retrieval, --keys"):
        ImportConfig(**options, clip_retrieval=tmp_path, keys=[Path("b")])
    with pytest.raises(ValueError, match="--match name --of text"):
        ImportConfig(**options, **pair, of="text", match="name")
    with pytest.raises(ValueError, match="--prompt: expected a cache of text"):
        ImportConfig(**options, **pair, prompt="a ")


def test_parquet_without_pyarrow_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tars: list[Path], raw: dict[Side, Rows], tmp_path: Path
) -> None:
    pair = write_pair(tmp_path / "m", *shuffled(raw["image"]), "parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pyarrow, not found: pip install 'threetowers\[parquet\]'"):
        run(tars, tmp_path / "cache", feature="projected", **pair)


KILLED = """
import os, signal, sys
from pathlib import Path
from threetowers.cache.exchange.importer import import_cache
from threetowers.cache.exchange.import_config import ImportConfig
from threetowers.cache.storage.local import LocalStorage

of, rows, keys, out, writes, *tars = sys.argv[1:]
count = 0
put = LocalStorage.put
def put_or_die(self, *args, **kwargs):
    global count
    count += 1
    if count > int(writes):
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, *args, **kwargs)
LocalStorage.put = put_or_die
config = ImportConfig(tars=tars, encoder="test:pair", of=of, feature="projected", output_dir=out, rows=[Path(rows)],
                      keys=[Path(keys)])
import_cache(config)
"""


@pytest.mark.parametrize(("of", "writes"), [("image", 11), ("text", 14)])
def test_a_killed_import_is_resumed_to_the_same_bytes(
    of: Side, writes: int, tars: list[Path], raw: dict[Side, Rows], tmp_path: Path
) -> None:
    pair = write_pair(tmp_path / "m", *shuffled(raw[of]))
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    options: dict[str, Any] = {"of": of, "feature": "projected"} | pair
    whole = run(tars, undisturbed, **options)
    arguments = [of, *pair["rows"], *pair["keys"], out, writes, *tars]
    process = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], env=PROCESS_ENV, check=False)
    assert process.returncode == -signal.SIGKILL
    done = len(EmbeddingCache.open(out).finished())
    assert 0 < done < 3
    report = run(tars, out, **options)
    assert (report.kept, report.tars) == (done, 3 - done)
    assert (report.used, report.unmatched) == (whole.used, whole.unmatched)
    found, expected = open_storage(out), open_storage(undisturbed)
    assert found.walk() == expected.walk()
    for name in expected.walk():
        if not name.startswith("done/"):
            assert found.read(name) == expected.read(name), name
    for tar_id in range(3):
        one, other = (EmbeddingCache.open(folder).record(tar_id) for folder in (out, undisturbed))
        assert without_times(one) == without_times(other)


def read_as_peers_do(folder: Path, name: str) -> tuple[np.ndarray, pyarrow.Table]:
    """All parts in the order of their names, as embedding-reader pairs them: rows i of matrices and tables."""
    matrices = sorted((folder / name).glob("*.npy"))
    tables = sorted((folder / "metadata").glob("*.parquet"))
    assert [path.stem.rpartition("_")[2] for path in matrices] == [path.stem.rpartition("_")[2] for path in tables]
    rows = [np.load(path, mmap_mode="r") for path in matrices]
    read = [parquet.read_table(path) for path in tables]
    assert [len(each) for each in rows] == [each.num_rows for each in read]
    return np.concatenate(rows), pyarrow.concat_tables(read)


@pytest.mark.parametrize("of", ["image", "text"])
def test_an_export_is_read_by_other_tools_and_imported_again(
    of: Side,
    tars: list[Path],
    samples: list[list[CaptionedSample]],
    raw: dict[Side, Rows],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"encoder": ENCODER, "of": of, "feature": "projected"}
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "cache", device="cpu", **options))
    cache = EmbeddingCache.open(tmp_path / "cache")
    report = export_cache(tmp_path / "cache", tmp_path / "out", rows_per_part=7)
    rows_nD, table = read_as_peers_do(tmp_path / "out", "img_emb" if of == "image" else "text_emb")
    columns = table.to_pydict()
    assert rows_nD.dtype == np.float16
    assert report.rows == len(rows_nD) == table.num_rows
    assert report.parts == -(-len(rows_nD) // 7)
    assert columns["image_path"] == columns["key"]
    position: dict[tuple[str, int], int] = {}
    for row, (tar, ordinal, key) in enumerate(zip(columns["tar"], columns["ordinal"], columns["key"], strict=True)):
        tar_id = int(tar.removesuffix(".tar"))
        number = position.get((tar, ordinal), 0)
        position[tar, ordinal] = number + 1
        caption = columns["caption"][row] if of == "text" else None
        where = tar_id, ordinal, key
        row_D = cache.row(*where) if caption is None else cache.caption_row(*where, number, caption)
        assert np.array_equal(rows_nD[row], row_D.astype(np.float16))
        if of == "text":
            sources = [source for source, each in samples[tar_id][ordinal].captions.items() for _ in each]
            assert columns["caption_source"][row] == sources[number]
    assert report.without == sum(not s.captions for tar in samples for s in tar if of == "text")

    run(tars, tmp_path / "again", clip_retrieval=tmp_path / "out", **options)
    again = EmbeddingCache.open(tmp_path / "again")
    for tar_id in range(3):
        assert np.array_equal(again.tar(tar_id), cache.tar(tar_id), equal_nan=True)
    assert command.export(str(tmp_path / "cache"), tmp_path / "one", [str(tars[2])], dtype="float32") == 0
    one_nD, _ = read_as_peers_do(tmp_path / "one", "img_emb" if of == "image" else "text_emb")
    assert one_nD.dtype == np.float32
    expected_nD = cache.tar(2)
    assert np.array_equal(one_nD, expected_nD[np.isfinite(expected_nD).all(axis=1)])
    assert "rows of 1 tars in 1 parts" in capsys.readouterr().out


def test_an_export_that_cannot_be_written(
    tars: list[Path], samples: list[list[CaptionedSample]], pack: Pack, tmp_path: Path
) -> None:
    copies = [pack(tmp_path / f"t/{i}.tar", [(s.key, s.members) for s in samples[i]]) for i in range(2)]
    options: dict[str, Any] = {"tars": copies, "encoder": ENCODER, "feature": "projected", "device": "cpu"}
    build_cache(BuildConfig(output_dir=tmp_path / "cache", **options))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(ValueError, match=r"full: expected a new or empty folder \(--output-dir\)"):
        export_cache(tmp_path / "cache", tmp_path / "full")
    with pytest.raises(ValueError, match="--rows-per-part 0: expected at least 1"):
        export_cache(tmp_path / "cache", tmp_path / "out", rows_per_part=0)
    pack(copies[1], [("other", samples[1][0].members)])
    with pytest.raises(ManifestError, match=r"1\.tar"):
        export_cache(tmp_path / "cache", tmp_path / "out")
    (tmp_path / "cache/done/0.json").unlink()
    with pytest.raises(ManifestError, match=r"tar 0\.tar \(0\): incomplete"):
        export_cache(tmp_path / "cache", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export = export_cache  # an interrupted one is written anew
    pack(copies[1], [(s.key, s.members) for s in samples[1]])
    build_cache(BuildConfig(output_dir=tmp_path / "cache", **options))
    assert (tmp_path / "out.partial").exists()
    assert export(tmp_path / "cache", tmp_path / "out").rows == 10
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("of", ["image", "text"])
def test_a_feature_to_unit_norm_is_the_other_one_scaled(of: Side) -> None:
    side = load_frozen_encoder(ENCODER).side(of)
    inputs: Any = (
        torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).remainder(251).to(torch.uint8)
        if of == "image"
        else side.tokenize(["a dog", "two red cats"])  # type: ignore[union-attr]
    )
    unit_bD, pooled_bD, raw_bD = side.forward(inputs, ["unit:projected", "pooled", "projected"])
    assert side.width("unit:projected") == raw_bD.shape[1] == 12
    assert pooled_bD.shape[1] == side.width("pooled") == 24
    torch.testing.assert_close(unit_bD, raw_bD / raw_bD.norm(dim=1, keepdim=True))
    assert cosines(unit_bD.numpy(), raw_bD.numpy()).min() > 0.999999
    with pytest.raises(ValueError, match=r"expected one of pooled, projected, found 'nothing'"):
        side.width("unit:nothing")


def test_rows_are_compared_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, raw: dict[Side, Rows], tmp_path: Path
) -> None:
    """Three rows of each key, one of them another: found in whichever block of rows it is."""
    from threetowers.cache.exchange.matrix import open_matrices

    monkeypatch.setattr(source_rows, "COMPARED_ROWS", 2)
    keys, rows_nD = shuffled(raw["image"])
    pair = write_pair(tmp_path / "m", keys * 3, np.concatenate([rows_nD, rows_nD * 2, rows_nD]))
    source = source_rows.SourceRows(
        open_matrices(pair["rows"], pair["keys"], "key"), hash_of=lambda key: hash(key) % 2**63
    )
    assert (len(source), source.repeated) == (48, 32)
    for at in range(16, 48):
        other_nD = np.concatenate([rows_nD] * 3)
        other_nD[at] = -other_nD[at]
        np.save(pair["rows"][0], other_nD)
        parts = open_matrices(pair["rows"], pair["keys"], "key")
        with pytest.raises(BadSource, match=rf"\b{at} of .*two different embeddings"):
            source_rows.SourceRows(parts, hash_of=lambda key: hash(key) % 2**63)
