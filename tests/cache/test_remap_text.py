"""Rows of captions follow their samples into other tars, whatever the order of their captions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cache.caches import DTYPES, CaptionsBySource, make_text_cache, some_captions
from threetowers.cache import cli as command
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.remap.remap import remap
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.captions import caption_hash
from threetowers.cache.webdataset.defects import BadSample

Pack = Callable[..., Path]
SOURCES = ("txt", "json.captions")
SIZES = [9, 6]


def members(captions: CaptionsBySource) -> dict[str, bytes]:
    """The members of a sample that has these captions, the first of a text member alone."""
    found = {"json": json.dumps({"captions": list(captions.get("json.captions", []))}).encode()}
    return found | ({"txt": captions["txt"][0].encode()} if captions.get("txt") else {})


def single(tars: list[list[CaptionsBySource]]) -> list[list[CaptionsBySource]]:
    """The captions with one of the text member at most, as tars can hold them."""
    return [[{**sample, **({"txt": sample["txt"][:1]} if "txt" in sample else {})} for sample in tar] for tar in tars]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_follow_their_samples_into_any_sharding(dtype: str, pack: Pack, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tars = single(some_captions(rng, SIZES))
    make_text_cache(tmp_path / "old", tars, 7, dtype, SOURCES)
    samples = {f"{tar_id}/{i}": sample for tar_id, tar in enumerate(tars) for i, sample in enumerate(tar)}
    keys = rng.permutation(sorted(samples))[:13]
    parts = [
        pack(tmp_path / f"{i}.tar", [(k, members(samples[k])) for k in part])
        for i, part in enumerate((keys[:5], keys[5:]))
    ]
    report = remap(tmp_path / "old", tmp_path / "new", parts)
    empty = sum(not samples[key] for key in keys)
    assert (report.tars, report.samples, report.bad, report.missing, report.changed) == (2, 13 - empty, empty, 0, 0)
    old, new = EmbeddingCache.open(tmp_path / "old"), EmbeddingCache.open(tmp_path / "new", of="text")
    for key in keys:
        if not samples[key]:
            tar_id, ordinal = new.find(key)
            assert new.status(tar_id)[ordinal] == RowStatus.NO_CAPTION
            continue
        at, before = (*new.find(key), key), (*old.find(key), key)
        assert np.array_equal(new.caption_rows(*at), old.caption_rows(*before))
        assert np.array_equal(new.captions(*at).source_k, old.captions(*before).source_k)
        new.check_captions(*at, samples[key])
    found = verify(tmp_path / "new", parts, check_contents=True)
    assert found.ok, found.text()
    assert new.record(0).source == "remap"
    assert new.record(0).cosines.min is not None
    (tmp_path / "new/done/1.json").unlink()
    assert (again := remap(tmp_path / "old", tmp_path / "new", parts)).tars == 1
    assert again.kept == 1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    tars = [[{"txt": ["a"], "json.captions": ["b", "c"]}, {"txt": ["d"]}, {}], [{"json.captions": ["e", "a"]}]]
    make_text_cache(tmp_path / "old", tars, 5, sources=SOURCES)  # type: ignore[arg-type]
    return tmp_path / "old"


@pytest.mark.parametrize(
    "now",
    [
        {"txt": ["a"], "json.captions": ["c", "b"]},
        {"txt": ["c"], "json.captions": ["a"]},
        {"json.captions": ["b", "b", "a"]},
    ],
)
def test_captions_may_be_reordered_and_removed(now: CaptionsBySource, old: Path, pack: Pack, tmp_path: Path) -> None:
    tar = pack(tmp_path / "0.tar", [("0/0", members(now))])
    remap(old, tmp_path / "new", [tar])
    before, after = EmbeddingCache.open(old), EmbeddingCache.open(tmp_path / "new")
    after.check_captions(0, 0, "0/0", now)
    rows = dict(zip("abc", before.caption_rows(0, 0, "0/0"), strict=True))
    wanted = [caption for captions in now.values() for caption in captions]
    assert np.array_equal(after.caption_rows(0, 0, "0/0"), np.stack([rows[caption] for caption in wanted]))
    assert verify(tmp_path / "new", [tar], check_contents=True).ok


def test_a_sample_with_a_new_caption_is_refused_filtered_or_left_to_a_build(
    old: Path, pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = [
        pack(
            tmp_path / "0.tar",
            [("0/0", members({"txt": ["a"], "json.captions": ["x"]})), ("0/1", members({"txt": ["d"]}))],
        ),
        pack(tmp_path / "1.tar", [("new", members({"txt": ["a"]})), ("0/2", members({"txt": ["a"]}))]),
        pack(tmp_path / "2.tar", [("1/0", members({"txt": ["a"]})), ("none", {"txt": b" "})]),
    ]
    with pytest.raises(ManifestError, match=r"1 samples have no row of their key in .*, 2 have one of other captions"):
        remap(old, tmp_path / "refused", tars)
    assert not (tmp_path / "refused").exists()
    report = remap(old, tmp_path / "filtered", tars, missing="filtered")
    assert (report.tars, report.samples, report.missing, report.changed, report.bad) == (3, 2, 1, 2, 1)
    opened = EmbeddingCache.open(tmp_path / "filtered")
    assert opened.status(0).tolist() == [RowStatus.FILTERED, RowStatus.OK]
    assert opened.status(2).tolist() == [RowStatus.OK, RowStatus.NO_CAPTION]
    reasons = [bad.reason for tar_id in range(3) for bad in opened.record(tar_id).bad]
    assert reasons[:3] == [
        "remapped: a caption of it has no row",
        "remapped: no rows of this key",
        "remapped: a caption of it has no row",
    ]
    assert "no caption (txt: empty); found members ['txt']" in reasons[3]
    assert verify(tmp_path / "filtered", tars).ok
    assert remap(old, tmp_path / "left", tars, missing="build").left == tuple(map(str, tars[:2]))
    with pytest.raises(BadSample, match=r"2\.tar: sample 'none': no caption .*--on-bad skip"):
        remap(old, tmp_path / "strict", tars, on_bad="error")
    assert command.remap(str(old), str(tmp_path / "printed"), [str(tars[2])]) == 0
    assert "0 with other captions, 1 without a caption" in capsys.readouterr().out


def test_nonfinite_samples_are_counted_as_such_and_stay_so(
    pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their captions have no hash in the cache, also the finite ones beside a nonfinite one."""
    captions: list[CaptionsBySource] = [{"txt": ["a"]}, {"txt": ["a"], "json.captions": ["inf"]}, {"txt": ["inf"]}]
    make_text_cache(tmp_path / "old", [captions], 5, sources=SOURCES, nonfinite=["inf"])
    now = [captions[2], captions[0], captions[1]]
    tar = pack(tmp_path / "0.tar", [(f"0/{i}", members(each)) for i, each in zip((2, 0, 1), now, strict=True)])
    report = remap(tmp_path / "old", tmp_path / "new", [tar])
    assert (report.samples, report.missing, report.changed, report.nonfinite) == (1, 0, 0, 2)
    opened = EmbeddingCache.open(tmp_path / "new")
    assert opened.status(0).tolist() == [RowStatus.NON_FINITE, RowStatus.OK, RowStatus.NON_FINITE]
    assert opened.record(0).counts == {"non_finite": 2}
    assert verify(tmp_path / "new", [tar], check_contents=True).ok
    assert command.remap(str(tmp_path / "old"), str(tmp_path / "printed"), [str(tar)]) == 0
    printed = capsys.readouterr().out
    assert "1 samples carried over" in printed
    assert "0 new, 0 with other captions, 0 without a caption, 2 whose embedding was nonfinite" in printed


def test_equal_captions_of_a_tar_keep_one_embedding(pack: Pack, tmp_path: Path) -> None:
    """Also where two old tars embedded the same caption, in batches of their own."""
    make_text_cache(tmp_path / "old", [[{"txt": ["a"]}], [{"txt": ["a"]}]], 5, "float32")
    opened = EmbeddingCache.open(tmp_path / "old")
    tar = pack(tmp_path / "0.tar", [("0/0", {"txt": b"a"}), ("1/0", {"txt": b"a"})])
    remap(tmp_path / "old", tmp_path / "new", [tar])
    rows = EmbeddingCache.open(tmp_path / "new").tar(0)
    assert np.array_equal(rows, np.stack([opened.caption_row(0, 0, "0/0", 0)] * 2))
    assert verify(tmp_path / "new", [tar], check_contents=True).ok


def test_changed_captions_are_found_by_verify(old: Path, pack: Pack, tmp_path: Path) -> None:
    first = [("0/1", {"txt": b"d"}), ("1/0", members({"json.captions": ["e", "a"]})), ("0/2", {"cls": b"1"})]
    tar = pack(tmp_path / "0.tar", first)
    remap(old, tmp_path / "new", [tar])
    assert verify(tmp_path / "new", [tar], check_contents=True).ok
    changed = [("0/1", {"txt": b"D"}), ("1/0", members({"json.captions": ["a", "e"]})), ("0/2", {"cls": b"2"})]
    pack(tar, changed)  # of the same sizes: the fingerprint stays
    assert verify(tmp_path / "new", [tar]).ok
    report = verify(tmp_path / "new", [tar], check_contents=True)
    (problem,) = report.problems
    assert "2 samples have other captions than were embedded: '0/1': caption 0 (txt: 'D') was changed" in problem.text
    assert "'1/0': caption 0 (json.captions: 'a') was moved: it was caption 1" in problem.text
    assert caption_hash("D") != caption_hash("d")
