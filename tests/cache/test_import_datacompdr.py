"""The tars of DataCompDR become caches of augmented crops and of captions, and a run replays the crops."""

import gzip
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cache.reinforced_tars import (
    CROP_SIDE,
    Reinforcement,
    draw_crop,
    members,
    show_crop,
    write_reinforced,
)
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.live import embed, embed_captions
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.datacompdr import embeddings as embeddings_module
from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement
from threetowers.cache.exchange.datacompdr.crops import read_crops
from threetowers.cache.exchange.datacompdr.embeddings import read_embeddings
from threetowers.cache.exchange.import_config import ImportConfig
from threetowers.cache.exchange.importer import ImportReport, import_cache
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.rand_augment import RandAugment
from threetowers.cache.format.views import Views, as_pixels
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.images import BadImage, read_stored_size
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.transforms import stored_view

Tar = list[Reinforcement]
TEACHERS = (f"test:pair@{CROP_SIDE}", f"test:pair@{CROP_SIDE}:seed:1")
WIDTH = 12
SIZES = (5, 2)
N_CROPS = 3
VIEWS = Views("crops:3", 0, 0.08, "randaugment:2:9")
POLICY = RandAugment(2, 9)


def picture(tar: int, i: int, draw: Callable[..., Image.Image]) -> Image.Image:
    return draw(10 * tar + i, (161 + 57 * i, 390 - 41 * i))


def own_caption(tar: int, i: int) -> str:
    return f"a red dog {tar} {i}"


@pytest.fixture(scope="module")
def samples(draw: Callable[..., Image.Image]) -> list[Tar]:
    """Embeddings of two teachers, who saw the crops as torchvision shows them."""
    encoders = [load_frozen_encoder(name) for name in TEACHERS]
    made = []
    for tar, size in enumerate(SIZES):
        made.append([])
        for i in range(size):
            image = picture(tar, i, draw)
            crops = [draw_crop(image, 100 * tar + 3 * i + k) for k in range(N_CROPS)]
            pixels = [as_pixels(show_crop(image, crop)) for crop in crops]
            # The second is there twice, and elsewhere too: equal captions, equal rows
            captions = [f"a blue bird {i}", "a cat", "a cat"]
            own = own_caption(tar, i)
            image_emb = [embed(encoder.side("image"), pixels, "unit:projected") for encoder in encoders]
            text_emb = [embed_captions(e.side("text"), [own, *captions], "unit:projected") for e in encoders]
            both = [np.concatenate(rows, axis=1) for rows in (image_emb, text_emb)]
            made[-1].append(Reinforcement(f"{tar:08x}{i:024x}", crops, both[0], captions, both[1]))
    return made


def image_members(tar: int, i: int, draw: Callable[..., Image.Image], sample: Reinforcement) -> dict[str, bytes]:
    buffer = io.BytesIO()
    picture(tar, i, draw).save(buffer, "png")
    fields = {"uid": sample.uid, "width": 1}
    return {"png": buffer.getvalue(), "txt": f" {own_caption(tar, i)}\n".encode(), "json": json.dumps(fields).encode()}


@pytest.fixture
def write(
    samples: list[Tar], draw: Callable[..., Image.Image], pack: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[list[Path], list[Path]]]:
    """write(layout, kind): tars with the images, and tars with the embeddings, which may be the same."""

    def make(layout: str = "apart", kind: str = "npz") -> tuple[list[Path], list[Path]]:
        images, reinforced = [], []
        for tar, found in enumerate(samples):
            pictures = [image_members(tar, i, draw, sample) for i, sample in enumerate(found)]
            if layout == "together":
                both = [(s.uid, members(s, kind) | more) for s, more in zip(found, pictures, strict=True)]
                images.append(write_reinforced(tmp_path / f"{tar}.tar", both))
                continue
            names = [f"{tar:05}{i:04}" if layout == "uid" else s.uid for i, s in enumerate(found)]
            images.append(pack(tmp_path / f"{tar}.tar", list(zip(names, pictures, strict=True))))
        if layout != "together":  # in another order, in other tars
            every = [(s.uid, members(s, kind)) for found in reversed(samples) for s in found]
            reinforced = [
                write_reinforced(tmp_path / f"dr/{n}.tar", part) for n, part in enumerate((every[:1], every[1:]))
            ]
        return images, reinforced or images

    return make


def run(tars: Sequence[Path], reinforced: Sequence[Path], out: Path, teacher: int = 0, **options: Any) -> ImportReport:
    columns = f"{WIDTH * teacher}:{WIDTH * teacher + WIDTH}"
    given: dict[str, Any] = {"encoder": TEACHERS[teacher], "columns": columns, "feature": "unit:projected"} | options
    return import_cache(ImportConfig(tars=tars, datacompdr=reinforced, output_dir=out, **given))


def half(rows: np.ndarray, teacher: int, kind: str = "npz") -> np.ndarray:
    """The columns of a teacher as they are stored in float16."""
    stored = torch.tensor(rows, dtype=torch.bfloat16).float().numpy() if kind == "pth.gz" else rows
    return stored[..., WIDTH * teacher : WIDTH * teacher + WIDTH].astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("layout", "kind", "match"),
    [("apart", "npz", "key"), ("together", "pth.gz", "key"), ("uid", "pth.gz", "uid")],
)
def test_crops_and_captions_of_each_teacher_become_a_cache(
    layout: str, kind: str, match: Any, samples: list[Tar], write: Callable[..., Any], tmp_path: Path
) -> None:
    tars, reinforced = write(layout, kind)
    captions = ("txt", "syn.json.syn_text") if layout == "together" else ("txt",)
    for teacher in (0, 1):
        images, texts = tmp_path / f"images{teacher}", tmp_path / f"texts{teacher}"
        report = run(tars, reinforced, images, teacher, match=match)
        assert (report.tars, report.samples, report.ok, report.counts) == (2, 7, 7, {})
        assert (report.rows, report.used, report.unmatched) == (7, 7, 0)
        run(tars, reinforced, texts, teacher, match=match, of="text", captions=captions)
        image_cache, text_cache = EmbeddingCache.open(images), EmbeddingCache.open(texts, of="text")
        assert image_cache.manifest.views == VIEWS
        for tar, found in enumerate(samples):
            for i, sample in enumerate(found):
                key = index_tar(tars[tar]).samples.key(i)
                for view in range(N_CROPS):
                    row_D = image_cache.row(tar, i, key, view)
                    assert np.array_equal(row_D, half(sample.image_emb[view], teacher, kind))
                rows_kD = text_cache.caption_rows(tar, i, key)
                expected_kD = sample.text_emb if layout == "together" else sample.text_emb[:1]
                assert np.abs(rows_kD - half(expected_kD, teacher, kind)).max() < 1e-6  # equal captions share a row
        weights = None if teacher == 0 else "seed:1"
        # bfloat16 has 8 bits; and the teachers rotated by the nearest pixel, a run interpolates.
        for folder, bound in ((images, 0.99), (texts, 0.9999)):
            checked = verify(folder, tars, depth="recompute", weights=weights, min_cosine=bound, check_contents=True)
            assert checked.ok, checked.text()
        again = run(tars, reinforced, images, teacher, match=match)
        assert (again.tars, again.kept, again.used) == (0, 2, 7)


def test_the_columns_of_another_teacher_are_found_by_recomputing(write: Callable[..., Any], tmp_path: Path) -> None:
    tars, reinforced = write()
    run(tars, reinforced, tmp_path / "cache", columns="12:24")
    report = verify(tmp_path / "cache", tars, depth="recompute", min_cosine=0.9)
    assert len(report.problems) == sum(SIZES)  # a view of each
    with pytest.raises(BadSource, match=r"rows of width 24, expected 12, that of .*--columns of this one"):
        run(tars, reinforced, tmp_path / "wide", columns=None)
    with pytest.raises(BadSource, match=r"--columns 20:32: the embeddings in .* have 24 columns"):
        run(tars, reinforced, tmp_path / "wide", columns="20:32")


def test_a_run_replays_the_crops_that_the_teachers_saw(
    samples: list[Tar], write: Callable[..., Any], draw: Callable[..., Image.Image], tmp_path: Path
) -> None:
    tars, reinforced = write()
    run(tars, reinforced, tmp_path / "cache")
    join = ImageJoin(tmp_path / "cache", [index_tar(tar) for tar in tars])
    op_ids = set()
    for tar, found in enumerate(samples):
        for i, sample in enumerate(found):
            image = picture(tar, i, draw)
            for view, crop in enumerate(sample.crops):
                params_P = join.view_params(tar, i, view, image.size)
                (top, left, height, width), ops = crop
                box = params_P[:4].astype(np.float64) * [image.width, image.height, image.width, image.height]
                assert np.allclose(box, [left, top, left + width, top + height], atol=1e-4)
                assert params_P[4] == 0
                assert params_P[5::2].tolist() == [op_id for op_id, _ in ops]
                op_ids |= {op_id for op_id, _ in ops}
                # The same picture: but for the border of the crop, and rotations by the nearest pixel.
                expected = np.asarray(show_crop(image, crop), np.int64).transpose(2, 0, 1)
                shown = (stored_view(image, CROP_SIDE, params_P, "bicubic").numpy()).astype(np.int64)
                assert np.abs(shown - expected).mean() < 1, crop
    assert op_ids == set(range(14))


@pytest.mark.parametrize(
    ("op_id", "magnitude", "value"),
    [
        (0, 0.0, 0),
        (2, -0.09000000357627869, -0.09),
        (3, 30.45317268371582, 30 / 224),
        (4, -30.45317268371582, -30 / 224),
        (5, -9.0, -9),
        (6, 0.26999998092651367, 1.27),
        (9, -0.26999998092651367, 0.73),
        (10, 7.0, 7),
        (11, 178.5, 178.5),
        (13, 0.0, 0),
    ],
)
def test_magnitudes_become_values(op_id: int, magnitude: float, value: float) -> None:
    """As DataCompDR writes them; torchvision moves by whole pixels."""
    crop = [[14, 34, 70, 27], [[op_id, magnitude], [12, 0.0]]]
    found = read_crops(json.dumps({"param_aug": [crop, [crop[0], None]]}).encode(), (61, 84), POLICY)
    expected = [34 / 61, 14 / 84, 1, 1, 0]
    assert np.allclose(found, [[*expected, op_id, value, 12, 0], [*expected, 0, 0, 0, 0]], atol=1e-6)
    assert found[0, 2] == found[0, 3] == 1
    # As a string, mirrored, and without operations
    text = json.dumps({"param_aug": json.dumps([[crop[0], True, crop[1]]])}).encode()
    assert read_crops(text, (61, 84), POLICY)[0].tolist() == [*found[0, :4].tolist(), 1, *found[0, 5:].tolist()]
    assert read_crops(json.dumps({"param_aug": [[crop[0]]]}).encode(), (61, 84), None).shape == (1, 5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[", "paug.json: not JSON"),
        (b"{}", "expected a list of crops"),
        (b'{"param_aug": "["}', "param_aug is not JSON"),
        (b'{"param_aug": []}', "expected a list of crops"),
        (b'{"param_aug": [[7, [0, 0, 9, 9], []]]}', "crop 0: expected .*, found "),
        (b'{"param_aug": [[[0, 0, 9.5, 9], []]]}', "crop 0: expected .*, found "),
        (
            b'{"param_aug": [[[0, 0, 85, 9], []]]}',
            r"crop 0 is 9 x 85 pixels at \(0, 0\), outside of its image of 61 x 84",
        ),
        (b'{"param_aug": [[[0, -1, 9, 9], []]]}', "outside of its image"),
        (b'{"param_aug": [[[0, 0, 9, 9], [[0, 0.0]]]]}', "1 operations, expected 2 .*--view-augment"),
        (b'{"param_aug": [[[0, 0, 9, 9], [[14, 0.0], [0, 0.0]]]]}', "found the operation"),
        (b'{"param_aug": [[[0, 0, 9, 9], [[5, NaN], [0, 0.0]]]]}', "found the operation"),
        (b'{"param_aug": [[[0, 0, 9, 9], [[5, 12.0], [0, 0.0]]]]}', "rotate at 12, which is no magnitude"),
        (b'{"param_aug": [[[0, 0, 9, 9], [[3, 45.0], [0, 0.0]]]]}', "translate_x at 45, which is no magnitude"),
    ],
)
def test_crops_that_mean_nothing_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadReinforcement, match=message):
        read_crops(data, (61, 84), POLICY)


def test_members_with_changed_bytes_are_refused_by_one_kind_of_error() -> None:
    """Whatever is damaged: the archives' own readers raise a dozen kinds."""
    rng = np.random.default_rng(5)
    crops = json.dumps({"param_aug": [[[14, 34, 70, 27], [[3, 30.45317268371582], [12, 0.0]]]] * 2}).encode()
    whole = {"npz": npz(image_emb=ROWS, text_emb=ROWS), "pth.gz": saved({"image_emb": torch.ones(2, 3)}), "paug": crops}
    refused = 0
    for _ in range(300):
        for name, data in whole.items():
            unpacked = bytearray(gzip.decompress(data) if name == "pth.gz" else data)
            at = int(rng.integers(len(unpacked)))
            unpacked[at : at + int(rng.integers(9))] = rng.bytes(int(rng.integers(5)))
            damaged = gzip.compress(unpacked, 1) if name == "pth.gz" else bytes(unpacked)
            try:
                if name == "paug":
                    assert read_crops(damaged, (61, 84), POLICY).shape[1] == 9
                else:
                    assert all(rows.dtype == np.float32 for rows in read_embeddings({name: damaged}, "image").values())
            except BadReinforcement:
                refused += 1
    assert refused > 600


class Evil:
    """A pickle that would do something."""

    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return gzip.compress(buffer.getvalue())


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


ROWS = np.ones((2, 3), np.float32)
BAD_MEMBERS = [
    ({}, "no member npz or pth.gz"),
    ({"npz": npz(text_emb=ROWS)}, "npz: no image_emb"),
    ({"npz": npz(image_emb=ROWS)[:-30]}, "npz: truncated, damaged or a pickle"),
    ({"npz": npz(image_emb=np.array([Evil()], object))}, "npz: truncated, damaged or a pickle"),
    ({"npz": npz(image_emb=ROWS[0])}, r"npz: image_emb: expected a matrix of floats, found float32 of shape \(3,\)"),
    ({"npz": npz(image_emb=ROWS.astype(int))}, "npz: image_emb: expected a matrix of floats, found int64"),
    ({"pth.gz": saved({"image_emb": torch.ones(2, 3)})[:-9]}, "pth.gz: truncated or damaged gzip"),
    ({"pth.gz": b"no gzip"}, "pth.gz: truncated or damaged gzip"),
    ({"pth.gz": gzip.compress(b"no tensors")}, "pth.gz: not tensors alone"),
    ({"pth.gz": saved({"image_emb": Evil()})}, "pth.gz: not tensors alone"),
    ({"pth.gz": gzip.compress(pickle.dumps(Evil()))}, "pth.gz: not tensors alone"),
    ({"pth.gz": saved([torch.ones(2, 3)])}, "pth.gz: expected tensors by name, found list"),
    ({"pth.gz": saved({"image_emb": [1.0]})}, "pth.gz: image_emb: expected a matrix of floats, found list"),
    ({"pth.gz": saved({"image_emb": torch.ones(3)})}, r"expected a matrix of floats, found float32 of shape \(3,\)"),
    ({"pth.gz": saved({"image_emb": torch.ones(2, 3).to_sparse()})}, "image_emb: expected a matrix of floats, found"),
    ({"pth.gz": saved({"image_emb": torch.ones(1, 1).expand(9**9, 9)})}, "image_emb: 3486784401 numbers, expected at"),
]


@pytest.mark.parametrize(("found", "message"), BAD_MEMBERS)
def test_embeddings_that_cannot_be_used_are_refused_and_nothing_is_unpickled(
    found: dict[str, bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadReinforcement, match=message):
        read_embeddings(found, "image")
    assert capsys.readouterr().out == ""


def test_embeddings_unpack_to_so_many_bytes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = np.zeros((1000, 100), np.float32)
    packed = io.BytesIO()
    np.savez_compressed(packed, image_emb=zeros)
    found = {"npz": packed.getvalue()}, {"pth.gz": saved({"image_emb": torch.from_numpy(zeros)})}
    for each in found:
        assert read_embeddings(each, "image")["image_emb"].shape == (1000, 100)
    monkeypatch.setattr(embeddings_module, "MAX_BYTES", 300_000)
    for each in found:
        with pytest.raises(BadReinforcement, match="bytes unpacked"):
            read_embeddings(each, "image")


def rewritten(tar: Path, samples: list[Tar], change: Callable[[int, dict[str, Any]], None]) -> list[Path]:
    """One tar with the embeddings of all samples, changed by their number."""
    found = [(s.uid, members(s)) for each in samples for s in each]
    for number, (_, of_sample) in enumerate(found):
        change(number, of_sample)
    return [write_reinforced(tar, found)]


def test_what_cannot_be_used_of_a_sample_is_its_status(
    samples: list[Tar], write: Callable[..., Any], tmp_path: Path
) -> None:
    tars, _ = write()

    def change(number: int, found: dict[str, Any]) -> None:
        embeddings = found["npz"]
        match number:
            case 0:
                found["npz"] = npz(**embeddings)[:-30]
            case 1:
                found["npz"] = {name: rows[:, :20] for name, rows in embeddings.items()}
            case 2:
                found["npz"] = {name: np.full_like(rows, np.nan) for name, rows in embeddings.items()}
            case 3:
                found["paug.json"] = json.dumps({"param_aug": [[[0, 0, 9999, 9], []]] * N_CROPS})
                found["syn.json"] = json.dumps({"syn_text": ["one", "two"]})
            case 4:
                del found["npz"]

    reinforced = rewritten(tmp_path / "dr.tar", samples, change)
    report = run(tars, reinforced, tmp_path / "images")
    assert (report.samples, report.ok, report.counts) == (7, 2, {"filtered": 4, "non_finite": 1})
    assert (report.rows, report.used) == (6, 6)
    text = report.text()
    uids = [sample.uid for sample in samples[0]]
    for uid, why in (
        (uids[0], r"npz: truncated, damaged or a pickle"),
        (uids[1], r"image_emb: 3 rows of width 20, expected 3 of width 24 as in other samples"),
        (uids[2], r"the embedding is nonfinite"),
        (uids[3], r"crop 0 is 9 x 9999 pixels at (0, 0), outside of its image of 332 x 267"),
        (uids[4], r"imported: no row of its key"),
    ):
        assert any(uid in line and why in line for line in text.splitlines()), (why, text)
    assert verify(tmp_path / "images", tars).ok
    with pytest.raises(ManifestError, match=r"4 of 5 samples have no row: .*npz: truncated"):
        run(tars, reinforced, tmp_path / "strict", missing="error")
    report = run(tars, reinforced, tmp_path / "texts", of="text")
    assert (report.ok, report.counts) == (2, {"filtered": 4, "non_finite": 1})
    assert "text_emb: 4 rows, expected one of the caption and one of each of the 2 synthetic" in report.text()
    assert verify(tmp_path / "texts", tars).ok


def test_sources_that_cannot_be_used_are_refused(
    samples: list[Tar], write: Callable[..., Any], pack: Callable[..., Path], tmp_path: Path
) -> None:
    tars, reinforced = write()
    out = tmp_path / "cache"
    with pytest.raises(BadSource, match=r"two samples of one key, expected keys that are unique in all of the tars"):
        run(
            tars,
            [*reinforced, write_reinforced(tmp_path / "x.tar", [(samples[0][1].uid, members(samples[0][1]))])],
            out,
        )
    with pytest.raises(BadSource, match=r"0\.tar: no sample has a member npz or pth\.gz, nor in 1 other tars"):
        run(tars, tars, out)
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"no tar")
    with pytest.raises(BadSource, match=r"none of 1 tars can be used and holds a sample \(--datacompdr\): .*bad\.tar"):
        run(tars, [bad], out, on_bad="skip_tars")
    pickles = rewritten(
        tmp_path / "pickles.tar", samples, lambda _, found: found.update(npz=npz(image_emb=np.array([Evil()])))
    )
    with pytest.raises(BadSource, match=r"npz: truncated, damaged or a pickle: .*; 7 samples were looked at"):
        run(tars, pickles, out)
    renamed = write_reinforced(tmp_path / "renamed.tar", [("other", members(samples[0][0]))])
    with pytest.raises(BadSource, match=r"none of 1 samples with embeddings goes with a sample .*'other' is the first"):
        run(tars, [renamed], out)
    twice = [*tars, pack(tmp_path / "twice.tar", [(samples[0][2].uid, {"png": b"", "txt": b"x"})])]
    with pytest.raises(BadSource, match=r"dr/1\.tar: sample '.*' goes with another sample too"):
        run(twice, reinforced, out)
    with pytest.raises(BadSource, match=r"rows of unit norm, where 'projected' of .*--feature unit:projected"):
        run(tars, reinforced, out, feature="projected")
    assert not out.exists()


def test_tars_with_gaps_are_left_to_a_build(samples: list[Tar], write: Callable[..., Any], tmp_path: Path) -> None:
    """It draws crops of the same policy, and the cache is one."""
    tars, _ = write()
    reinforced = rewritten(tmp_path / "dr.tar", samples, lambda number, found: number == 1 and found.pop("npz"))
    report = run(tars, reinforced, tmp_path / "cache", missing="build")
    assert report.left == (str(tars[0]),)
    options: dict[str, Any] = {"tars": tars, "encoder": TEACHERS[0], "feature": "unit:projected", "views": VIEWS}
    built = build_cache(BuildConfig(output_dir=tmp_path / "cache", device="cpu", **options))
    assert (built.tars_built, built.tars_kept) == (1, 1)
    assert verify(tmp_path / "cache", tars, depth="recompute", min_cosine=0.99).ok


def test_other_data_sets_have_several_lists_of_synthetic_captions(
    samples: list[Tar], write: Callable[..., Any], draw: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Each with rows of its own; and the caption of the sample may lie beside them."""
    tars, _ = write("together")
    found = []
    for i, sample in enumerate(samples[0]):
        of_sample = members(sample) | image_members(0, i, draw, sample)
        of_sample["syn.json"] = json.dumps({"syn_text_a": sample.captions[:1], "syn_text": sample.captions[1:], "n": 1})
        rows = sample.text_emb
        of_sample["npz"] = {"text_emb": rows[:1], "syn_text_a_emb": rows[1:2], "syn_text_emb": rows[2:]}
        found.append((sample.uid, of_sample))
    tar = write_reinforced(tmp_path / "several.tar", found)
    sources = ("txt", "syn.json.syn_text_a", "syn.json.syn_text")
    report = run([tar], [tar], tmp_path / "cache", of="text", captions=sources)
    assert report.ok == 5
    cache = EmbeddingCache.open(tmp_path / "cache", of="text")
    for i, sample in enumerate(samples[0]):
        assert np.array_equal(cache.caption_rows(0, i, sample.uid), half(sample.text_emb, 0))
    # Where the words are others than those of the tars with embeddings, nothing is taken for granted
    other = [(s.uid, image_members(0, i, draw, s) | {"txt": b"another caption"}) for i, s in enumerate(samples[0])]
    elsewhere = write_reinforced(tmp_path / "other.tar", other)
    report = run([elsewhere], [tar], tmp_path / "other", of="text")
    assert report.counts == {"filtered": 5}
    assert "no row of caption 'another caption' (members txt and syn.json)" in report.text()
    assert len(tars) == 2


def test_a_caption_with_two_embeddings_is_refused(
    samples: list[Tar], write: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows in another order than the captions: equal captions of two samples show it."""
    tars, _ = write("together")
    found = [(s.uid, members(s)) for s in samples[0]]
    rows = found[3][1]["npz"]["text_emb"]
    found[3][1]["npz"] = found[3][1]["npz"] | {"text_emb": rows[::-1].copy()}
    reinforced = [write_reinforced(tmp_path / "dr.tar", found)]
    report = run(tars[:1], reinforced, tmp_path / "cache", of="text", captions=("txt", "syn.json.syn_text"))
    assert (report.ok, report.counts) == (4, {"filtered": 1})
    assert "no row of caption 'a cat' that is as in a sample before" in report.text()


def test_crops_of_images_that_were_made_smaller_are_counted_in_the_original(
    samples: list[Tar], draw: Callable[..., Image.Image], pack: Callable[..., Path], tmp_path: Path
) -> None:
    """As img2dataset does; one was cropped, of one nothing is said, and one is turned by its EXIF."""
    found = []
    for i, sample in enumerate(samples[0]):
        image = picture(0, i, draw)
        buffer = io.BytesIO()
        size = (100, 100) if i == 2 else (image.width // 3, round(image.width // 3 * image.height / image.width))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 4 else 1
        image.resize(size).save(buffer, "jpeg", exif=exif)
        fields = {} if i == 3 else {"original_width": image.width, "original_height": image.height}
        found.append((sample.uid, {"jpg": buffer.getvalue(), "json": json.dumps(fields).encode()}))
    tars = [pack(tmp_path / "small.tar", found)]
    reinforced = [write_reinforced(tmp_path / "dr.tar", [(s.uid, members(s)) for s in samples[0]])]
    assert run(tars, reinforced, tmp_path / "pixels").ok < 2
    report = run(tars, reinforced, tmp_path / "cache", view_size="original")
    assert (report.ok, report.counts) == (2, {"filtered": 3})
    for why in (
        "it was cropped or padded",
        "original_height in the json member are None and None",
        "EXIF turns the image",
    ):
        assert why in report.text()
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert cache.status(0).tolist() == [RowStatus.OK] * 2 + [RowStatus.FILTERED] * 3
    (top, left, height, width), _ = samples[0][1].crops[2]
    size = picture(0, 1, draw).size
    expected = [left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1]]
    assert np.allclose(cache.view_params(0, 1, 2)[:4], expected, atol=1e-6)


def test_the_stored_size_is_that_before_the_exif_turns(draw: Callable[..., Image.Image]) -> None:
    for orientation, turned in ((1, False), (2, True), (6, True)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("jpeg", "png", "webp"):
            buffer = io.BytesIO()
            draw(1, (33, 47)).save(buffer, kind, exif=exif)
            assert read_stored_size(buffer.getvalue()) == ((33, 47), turned)
    with pytest.raises(BadImage, match="cannot be decoded"):
        read_stored_size(b"no image")


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tars": ["a.tar"], "output_dir": tmp_path, "encoder": TEACHERS[0]}
    with pytest.raises(ValueError, match=r"expected --clip-retrieval FOLDER, .* found --rows, --keys, --datacompdr"):
        ImportConfig(**options, datacompdr=["b.tar"], rows=[Path("a")], keys=[Path("b")])
    with pytest.raises(ValueError, match="--columns, --match uid, --view-size: expected --datacompdr"):
        ImportConfig(**options, clip_retrieval=tmp_path, columns="0:3", view_size="original", match="uid")
    views = {"view_scale": 0.5, "view_augment": "none"}
    with pytest.raises(ValueError, match=r"^--view-scale, --view-augment: expected --datacompdr"):
        ImportConfig(**options, clip_retrieval=tmp_path, **views)
    with pytest.raises(ValueError, match=r"^--view-scale, --view-augment --of text: only crops of images are views"):
        ImportConfig(**options, datacompdr=["b.tar"], of="text", **views)
    for columns in ("3", "3:3", "a:b", ":4", "-1:4"):
        with pytest.raises(ValueError, match="expected START:END with START before END"):
            ImportConfig(**options, datacompdr=["b.tar"], columns=columns)
    with pytest.raises(ValueError, match="--key-column: samples of --datacompdr are found by --match"):
        ImportConfig(**options, datacompdr=["b.tar"], key_column="uid")
    with pytest.raises(ValueError, match="augment 'much'"):
        ImportConfig(**options, datacompdr=["b.tar"], view_augment="much")
