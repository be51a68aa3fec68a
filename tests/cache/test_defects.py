"""What is wrong with one sample is the status of that sample; what is wrong with tars is told of all at once."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cache.conftest import encoded
from tests.conftest import picture, write_tar
from tests.defective import COUNTS, DEFECTS, MAX_BYTES, link, write_defective, write_members
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig, EncoderConfig
from threetowers.cache.estimate.estimate import estimate
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.info import read_info
from threetowers.cache.measure_views import measure_views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.remap.remap import remap
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.defects import BadSample, ImageDefect
from threetowers.cache.webdataset.sample import read_encoded_image, read_image
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.sample_stream import stream_images, stream_samples
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import index_tar, read_member
from threetowers.cache.webdataset.tar_list import image_defects, index_tars

BAD = sorted(int(key[1:]) for key in DEFECTS)
STATUS_COUNTS = {reason.replace(" ", "_"): 1 for reason in COUNTS}


@pytest.fixture(autouse=True)
def small_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threetowers.cache.webdataset.sample_list.MAX_MEMBER_BYTES", MAX_BYTES)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_defective(tmp_path / "x.tar")


@pytest.fixture(scope="module")
def options(tiny_encoder: Callable[..., str]) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64"), "batch_size": 5}


def test_each_status_has_a_defect_and_each_defect_a_status() -> None:
    assert {defect.name for defect in ImageDefect} | {"ABSENT", "OK", "FILTERED", "NON_FINITE", "NO_CAPTION"} == {
        status.name for status in RowStatus
    }
    assert [RowStatus.of(defect).value for defect in ImageDefect] == [2, 5, 6, 7, 8, 9]


def test_a_defect_is_its_samples_own_and_ordinals_stay(tar: Path) -> None:
    index = index_tar(tar)
    assert len(index.samples) == 24
    assert image_defects([index]) == COUNTS
    found = {sample.key: str(sample.defect) for sample in index.samples if sample.defect is not None}
    assert found == DEFECTS
    good = [ordinal for ordinal in range(24) if ordinal not in BAD]
    assert [(ordinal, key) for ordinal, key, _ in stream_images(index)] == [(i, f"s{i:04d}") for i in good]
    for first in (0, 1, 8):
        streamed = dict(stream_samples(index, first))
        assert list(streamed) == list(range(first, 24))
        assert all(members["txt"] == f"caption {ordinal}".encode() for ordinal, members in streamed.items())
    for ordinal in range(24):
        if ordinal in BAD:
            key = f"s{ordinal:04d}"
            with pytest.raises(BadSample, match=rf"x\.tar: sample '{key}': {DEFECTS[key]}: ") as caught:
                read_image(index, ordinal, 1 << 20)
            assert pickle.loads(pickle.dumps(caught.value)).reason == DEFECTS[key]
        else:
            assert read_image(index, ordinal, 1 << 20).size == (32, 32)


def test_members_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = write_members(tmp_path / "x.tar", ("a.png", b"1"), ("a.txt", bytes(MAX_BYTES + 1)), link("a.json", "a.txt"))
    index = index_tar(path)
    assert index.samples[0].defect is None
    with pytest.raises(BadSample, match=rf"'a': too large: \.txt has \d+ bytes, expected at most {MAX_BYTES}"):
        read_member(index, 0, "txt")
    with pytest.raises(BadSample, match=r"'a': not a file: \.json is a link"):
        read_member(index, 0, "json")
    assert list(stream_samples(index)) == [(0, {"png": b"1"})]


@pytest.mark.parametrize(
    ("names", "image_member", "image"),
    [
        (("a.input.jpg", "a.outputs.txt"), "input.jpg", b"0"),
        (("a.left.jpg", "a.right.jpg", "a.json"), "right.jpg", b"1"),
        (("a.img", "a.cap"), "img", b"0"),
        (("a.jpg", "a.png", "a.txt"), "png", b"1"),
        (("a.JPG", "a.png"), "jpg", b"0"),
    ],
)
def test_the_image_member_can_be_named(tmp_path: Path, names: tuple[str, ...], image_member: str, image: bytes) -> None:
    entries = [(name, str(number).encode()) for number, name in enumerate(names)]
    path = write_members(tmp_path / "x.tar", *entries, ("b.gif", b"g"))
    index = index_tar(path, image_member=image_member)
    assert read_encoded_image(index, 0) == image
    assert list(stream_images(index)) == [(0, "a", image)]
    with pytest.raises(BadSample, match=rf"found members \['gif'\], expected a member \.{image_member}"):
        read_encoded_image(index, 1)

    with pytest.raises(ValueError, match=r"image_member \(--image-member\): found '\.JPG', .*: jpg$"):
        index_tar(path, image_member=".JPG")

    # What is kept of an index does not depend on it
    unnamed = index_tar(path)
    assert unnamed.fingerprint == index.fingerprint
    assert unnamed.samples[0].defect is not None
    again = SampleList.from_arrays(unnamed.samples.to_arrays(), image_member)
    assert list(again) == list(index.samples)


def test_numbered_copies_and_doubled_extensions_are_counted(tmp_path: Path) -> None:
    names = ["boat.jpg", "boat.txt", "boat.1.jpg", "boat.1.txt", "boat.2.jpg", "lamp.jpg.jpg", "5f70bf18"]
    index = index_tar(write_members(tmp_path / "x.tar", *((name, b"") for name in names)))
    assert [(sample.key, sample.defect) for sample in index.samples] == [("boat", None), ("lamp", "no image")]
    assert index.left_aside() == {
        "files without an extension": 1,
        ".*.jpg in samples": 3,
        ".*.txt in samples": 1,
    }
    many = index_tar(write_members(tmp_path / "y.tar", *((f"a.{i:03d}", b"") for i in range(99))))
    assert many.samples.unread().total() == 99
    assert len(many.samples.unread()) == 21
    assert "'005', '006', '007'] and 91 more, expected one of" in many.describe_defect(0)


def test_all_bad_tars_are_named_at_once(tmp_path: Path, tar: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:3000])
    (tmp_path / "zero.tar").touch()
    empty = write_members(tmp_path / "none.tar")
    paths = [str(tmp_path / name) for name in ("cut.tar", "none.tar", "x.tar", "zero.tar")]
    for on_bad in ("error", "skip"):
        with pytest.raises(BadTar, match=r"(?s)2 of 4 tars.*cut\.tar: truncated.*zero\.tar.*on_bad: skip_tars"):
            index_tars(paths, on_bad=on_bad)  # type: ignore[arg-type]
    listed = index_tars(paths, on_bad="skip_tars")
    assert [index.location for index in listed.tars] == [str(tar)]
    assert listed.empty == [str(empty)]
    assert ["cut.tar" in listed.bad[0], "zero.tar" in listed.bad[1]] == [True, True]
    assert listed.notes()[-1] == f"1 tars hold no samples: {empty}"


def test_a_build_gives_defective_samples_a_status(tar: Path, options: dict[str, Any], tmp_path: Path) -> None:
    sound = write_tar(
        tmp_path / "sound.tar",
        [(f"s{i:04d}", {"png": picture("red", "disc", i), "txt": b""}) for i in range(24)],
    )
    cut, empty = tmp_path / "cut.tar", write_members(tmp_path / "none.tar")
    cut.write_bytes(tar.read_bytes()[:3000])
    config = BuildConfig(tars=[tar, empty], output_dir=tmp_path / "out", **options)
    report = build_cache(config)
    assert (report.tars_built, report.samples, report.ok, report.counts) == (1, 24, 19, STATUS_COUNTS)
    assert report.left_out.empty == [str(empty)]
    assert report.ignored == {".tif in samples": 1}
    build_cache(dataclasses.replace(config, tars=[sound], output_dir=tmp_path / "sound"))

    # Every sample has its row, and the rows of sound samples are those of a tar without defects.
    opened, reference = EmbeddingCache.open(tmp_path / "out"), EmbeddingCache.open(tmp_path / "sound")
    status = opened.status(0)
    assert [RowStatus(s).name.lower().replace("_", " ") for s in status[BAD]] == list(DEFECTS.values())
    good = np.delete(np.arange(24), BAD)
    np.testing.assert_allclose(opened.tar(0)[good], reference.tar(0)[good], rtol=2e-3, atol=1e-3)
    assert np.array_equal(opened.columns(0).key_hash_n, reference.columns(0).key_hash_n)
    assert [(bad.ordinal, bad.key) for bad in opened.record(0).bad] == [(i, f"s{i:04d}") for i in BAD]
    text = read_info(tmp_path / "out").text()
    assert "24 of 24: 19 embedded, 1 ambiguous image, 1 no image, 1 not a file, 1 too large, 1 unknown format" in text
    assert "not read  1 .tif in samples" in text
    assert "s0003 (ordinal 3): ambiguous image: found members ['jpg', 'png', 'txt']" in text

    # The same policy everywhere; what headers tell is told before a teacher is loaded.
    strict = dataclasses.replace(
        config, output_dir=tmp_path / "strict", on_bad="error", encoder="timm:test_vit:missing.safetensors"
    )
    with pytest.raises(BadSample, match=r"x\.tar: sample 's0001': no image: .* 1 too large"):
        build_cache(strict)
    with pytest.raises(BadTar, match=r"1 of 2 tars cannot be used.*cut\.tar"):
        build_cache(dataclasses.replace(strict, tars=[cut, tar], on_bad="skip"))
    useless = write_members(tmp_path / "useless.tar", ("a.tif", b""), ("b.txt", b""))
    with pytest.raises(BadSample, match=r"none of 2 samples can be used: 1 .*, 1 .*; the first: .*useless\.tar.* 'a'"):
        build_cache(dataclasses.replace(strict, tars=[useless, empty], on_bad="skip"))
    assert not (tmp_path / "strict").exists()
    resumed = build_cache(dataclasses.replace(config, tars=[cut, tar], on_bad="skip_tars"))
    assert (resumed.tars_built, resumed.tars_kept) == (0, 1)
    assert "cut.tar: truncated" in resumed.left_out.bad[0]
    with pytest.raises(BadTar, match=r"none of 2 tars can be used; the first: .*cut\.tar"):
        build_cache(dataclasses.replace(strict, tars=[cut, empty], on_bad="skip_tars"))

    # Verification and remapping know these samples.
    checked = verify(tmp_path / "out", [tar, empty], check_contents=True)
    assert checked.ok, checked.text()
    assert checked.counts == STATUS_COUNTS
    assert not verify(tmp_path / "out", [tar, cut], depth="metadata").ok
    assert verify(tmp_path / "out", [tar, cut], depth="metadata", on_bad="skip_tars").ok
    moved = write_defective(tmp_path / "shorter.tar", 12)
    remapped = remap(tmp_path / "out", tmp_path / "new", [moved, empty])
    assert (remapped.samples, remapped.bad, remapped.missing, remapped.changed) == (7, 5, 0, 0)
    new = EmbeddingCache.open(tmp_path / "new")
    assert new.record(0).counts == STATUS_COUNTS
    np.testing.assert_array_equal(new.tar(0), opened.tar(0)[:12])
    with pytest.raises(BadSample, match="'s0001': no image"):
        remap(tmp_path / "out", tmp_path / "never", [moved], on_bad="error")


def test_samples_of_a_data_set_are_counted_by_reason(tar: Path, options: dict[str, Any]) -> None:
    encoder = options["encoder"]
    measured = measure_views(EncoderConfig(tars=[tar], encoder=encoder), crop_scales=(0.9,), draws=1)
    assert (measured.images, measured.bad) == (19, COUNTS)
    assert "left out: 1 no image, 1 ambiguous image" in measured.text()
    costs = estimate(EmbeddingConfig(tars=[tar], encoder=encoder))
    assert (costs.sampled, costs.bad, costs.n_samples) == (19, COUNTS, 24)
    with pytest.raises(BadSample, match="on_bad: skip"):
        measure_views(EncoderConfig(tars=[tar], on_bad="error", encoder=encoder), crop_scales=(0.9,), draws=1)


def test_a_cache_is_of_one_image_member(options: dict[str, Any], tmp_path: Path) -> None:
    pairs = [
        (f"{i:02d}", {"left.png": picture("red", "disc", i), "right.png": picture("blue", "bar", i)}) for i in range(5)
    ]
    path = write_tar(tmp_path / "x.tar", pairs)
    caches = {}
    for member in ("left.png", "right.png"):
        config = BuildConfig(tars=[path], output_dir=tmp_path / member, image_member=member, **options)
        assert build_cache(config).ok == 5
        caches[member] = EmbeddingCache.open(tmp_path / member)
        assert caches[member].manifest.image_member == member
        assert verify(tmp_path / member, [path], check_contents=True).ok
    assert (caches["left.png"].tar(0) != caches["right.png"].tar(0)).any()
    with pytest.raises(ManifestError, match=r"image_member: expected right\.png, found left\.png"):
        build_cache(dataclasses.replace(config, image_member="left.png"))
    assert "image     the member .right.png of each sample" in read_info(tmp_path / "right.png").text()
    single = write_tar(tmp_path / "y.tar", [(key, {"jpg": members["left.png"]}) for key, members in pairs])
    remap(tmp_path / "left.png", tmp_path / "single", [single], image_member="jpg")
    np.testing.assert_array_equal(EmbeddingCache.open(tmp_path / "single").tar(0), caches["left.png"].tar(0))


def test_the_bound_on_pixels_is_an_option(options: dict[str, Any], tmp_path: Path) -> None:
    large = encoded(Image.new("RGB", (80, 60)))
    path = write_tar(tmp_path / "x.tar", [("a", {"png": large}), ("b", {"png": picture("red", "disc", 1)})])
    config = BuildConfig(tars=[path], output_dir=tmp_path / "out", max_pixels=4799, **options)
    assert build_cache(config).counts == {"too_large": 1}
    assert "more than max_pixels=4799" in EmbeddingCache.open(tmp_path / "out").record(0).bad[0].reason
    assert build_cache(dataclasses.replace(config, output_dir=tmp_path / "all", max_pixels=4800)).ok == 2
    with pytest.raises(ValueError, match="--max-pixels 0"):
        dataclasses.replace(config, max_pixels=0)
