import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from tests.defective import link, write_members
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.sample_stream import (
    stream_annotations,
    stream_images,
    stream_samples,
    stream_texts,
)
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import index_tar, key_hash, read_member, split_name
from threetowers.cache.webdataset.tar_patterns import expand

Pack = Callable[..., Path]
MakeSamples = Callable[[int, int], list[tuple[str, dict[str, bytes]]]]
EMOJI = sorted((Path(__file__).parents[2] / "data" / "emoji").glob("*.tar"))


@pytest.fixture
def tar(tmp_path: Path, pack: Pack, samples: MakeSamples) -> Path:
    return pack(tmp_path / "x.tar", samples(9, 4))


def test_index_agrees_with_webdataset(tar: Path) -> None:
    index = index_tar(tar)
    with open(tar, "rb") as file:
        theirs = list(group_by_keys(tar_file_expander([{"url": str(tar), "stream": file}])))
    assert len(index.samples) == len(theirs) == 9
    for ordinal, (ours, sample) in enumerate(zip(index.samples, theirs, strict=True)):
        assert ours == index.samples[ordinal]
        assert ours.key == sample["__key__"]
        assert ours.members.keys() == {"png", "txt"}
        assert ours.image == "png"
        for extension in ours.members:
            assert read_member(index, ordinal, extension) == sample[extension]
    assert index.samples[-1] == index.samples[8]
    assert [sample.key for sample in index.samples[2:4]] == [index.samples[2].key, index.samples[3].key]
    with pytest.raises(IndexError):
        index.samples[9]
    assert index.left_aside() == {}


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "d/a.jpg", "d.e/a.jpg", "d/a.B.Jpg", "a", ".hidden", "d/.hidden.jpg", "./a.PNG", "a.", "a/b.c.d/e.f"],
)
def test_split_name_follows_webdataset(name: str) -> None:
    key, extension = base_plus_ext(name)
    if key is None or not extension or name == "d/.hidden.jpg":
        assert split_name(name)[1] == ""
    else:
        assert split_name(name) == (key, extension.lower())


def test_stream_yields_images_in_order_and_hashes_every_byte(tar: Path) -> None:
    index, digest = index_tar(tar), xxhash.xxh3_128()
    for expected, (ordinal, key, data) in enumerate(stream_images(index, digest)):
        assert ordinal == expected
        assert key == index.samples[ordinal].key
        assert data == read_member(index, ordinal, "png")
    assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(tar.read_bytes())


def test_real_tars_stream_as_indexed() -> None:
    index = index_tar(EMOJI[0])
    assert [ordinal for ordinal, _, _ in stream_images(index)] == list(range(len(index.samples)))


def test_other_members_are_listed_but_never_read(tmp_path: Path) -> None:
    bomb = pickle.dumps(os.getcwd)
    path = write_members(
        tmp_path / "x.tar",
        ("__meta__/info.json", b"{}"),
        (".hidden", b"?"),
        ("README", b"?"),
        ("a.JPG", b"image"),
        ("a.pkl", bomb),
        ("a.seg.png", b"mask"),
    )
    index = index_tar(path)
    assert index.samples[0].members.keys() == {"jpg", "pkl", "seg.png"}
    assert index.ignored == {"__meta__ members": 1, "hidden files": 1, "files without an extension": 1}
    assert index.left_aside() == {**index.ignored, ".pkl in samples": 1, ".*.png in samples": 1}
    assert index.left_aside(["pkl"]) == {**index.ignored, ".*.png in samples": 1}
    assert list(stream_images(index)) == [(0, "a", b"image")]
    assert [found.keys() for _, found in stream_samples(index)] == [{"jpg"}]
    with pytest.raises(ValueError, match=r"'a': has no \.txt"):
        read_member(index, 0, "txt")


def test_long_and_foreign_names(tmp_path: Path) -> None:
    names = ["n" * 150 + "/" + "k" * 120 + ".png", "été/日本.png"]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
        index = index_tar(tmp_path / "x.tar")
        assert [sample.key + ".png" for sample in index.samples] == names
        assert read_member(index, 1, "png") == b"abc"
        assert len(list(stream_images(index))) == 2


def bytes_read() -> int:
    """The bytes that this process has asked the kernel for so far (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_of_a_local_tar_only_texts_are_read(tmp_path: Path) -> None:
    """They are those of the stream, which reads all of it; hard links and samples without a text, too."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(7):
            for extension, size in (("jpg", 150_000), ("json", 20 + number), ("txt", 9 * number), ("npy", 5000)):
                info = tarfile.TarInfo(f"s{number}.{extension}")
                info.size = size
                if (number, extension) == (5, "txt"):
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, "s3.txt", 0
                if (number, extension) != (4, "json"):
                    archive.addfile(info, io.BytesIO(bytes([65 + number]) * size))
    index = index_tar(tmp_path / "x.tar")
    extensions = frozenset({"json", "txt"})
    streamed = [(i, {e: members[e] for e in members.keys() & extensions}) for i, members in stream_samples(index)]
    assert streamed[5][1]["txt"] == b"D" * 27
    assert sum(len(members) for _, members in streamed) == 13
    before = bytes_read()
    found = [(i, {e: read(e) for e in streamed[i][1]}) for i, read in stream_texts(index, extensions)]
    n_read = bytes_read() - before
    assert found == streamed
    texts = sum(len(data) for _, members in streamed for data in members.values())
    assert texts <= n_read < texts + 1000 < index.size / 300
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:600_000])
    with pytest.raises(BadTar, match="has changed since it was indexed"):
        list(stream_annotations(index, CaptionFormat()))


def test_truncation_is_detected_at_every_length(tar: Path) -> None:
    whole = tar.read_bytes()
    index = index_tar(tar)
    last = index.samples[8].members["txt"]
    content_end = -(-(last.offset + last.size) // 512) * 512
    for length in [*range(0, content_end + 511, 256), content_end, content_end + 511]:
        tar.write_bytes(whole[:length])
        with pytest.raises(BadTar, match=r"x\.tar"):
            index_tar(tar)
    for length in (content_end + 512, content_end + 1000, content_end + 1024):  # one block of zeros is enough
        tar.write_bytes(whole[:length])
        assert len(index_tar(tar).samples) == 9
    tar.write_bytes(whole[:content_end])
    with pytest.raises(BadTar, match=r"no end-of-archive marker .* add the marker: truncate -s \+1024"):
        index_tar(tar)


def test_a_flipped_header_and_joined_tars_are_refused(tar: Path) -> None:
    whole = bytearray(tar.read_bytes())
    offset = index_tar(tar).samples[4].members["png"].offset
    whole[offset - 512 + 3] ^= 1
    tar.write_bytes(whole)
    with pytest.raises(BadTar, match="neither a member nor the end-of-archive marker"):
        index_tar(tar)
    whole[offset - 512 + 3] ^= 1
    tar.write_bytes(whole + whole)
    with pytest.raises(BadTar, match="joined by cat"):
        index_tar(tar)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3")], "sample 'a': found again"),
        ([("a.png", b"1"), ("b.png", b"2"), ("a.png", b"3")], "sample 'a': found again"),
        ([("a.png", b"1"), ("a.PNG", b"2")], r"sample 'a': found two members \.png"),
        ([("/a.png", b"1")], "leaves the archive"),
        ([("x/../../a.png", b"1")], "leaves the archive"),
    ],
)
def test_untrustworthy_tars_are_refused(
    tmp_path: Path, entries: list[tuple[str, bytes] | tarfile.TarInfo], message: str
) -> None:
    with pytest.raises(BadTar, match=message) as caught:
        index_tar(write_members(tmp_path / "x.tar", *entries))
    assert str(tmp_path / "x.tar") in str(caught.value)


def test_empty_files_and_compressed_tars_are_refused(tmp_path: Path, tar: Path) -> None:
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.add(tar, "a.png")
    for name in ("empty.tar", "z.tar"):
        with pytest.raises(BadTar, match="not a complete, plain tar"):
            index_tar(tmp_path / name)


def test_hard_links_have_the_bytes_of_their_targets(tmp_path: Path) -> None:
    path = write_members(
        tmp_path / "x.tar",
        ("a.png", b"one"),
        ("a.txt", b"a"),
        link("b.png", "a.png", tarfile.LNKTYPE),
        ("b.txt", b"b"),
        link("c.png", "b.png", tarfile.LNKTYPE),
        ("d.png", b"two"),
        link("e.png", "missing.png", tarfile.LNKTYPE),
    )
    index = index_tar(path)
    assert [ordinals.tolist() for ordinals in index.samples.defects().values()] == [[4]]
    assert index.samples[4].defect == "not a file"
    expected = [(0, "a", b"one"), (1, "b", b"one"), (2, "c", b"one"), (3, "d", b"two")]
    assert list(stream_images(index)) == expected
    assert [(i, index.samples.key(i), read_member(index, i, "png")) for i in range(4)] == expected
    assert list(stream_samples(index, 2)) == [(2, {"png": b"one"}), (3, {"png": b"two"}), (4, {})]


def test_names_of_owners_need_no_encoding_but_keys_do(tmp_path: Path) -> None:
    for member, owner in (("a.png", "j\xf6rg"), ("caf\xe9.png", "joerg"), (".caf\xe9", "joerg")):
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
            for name in (member, "z.png"):
                info = tarfile.TarInfo(name)
                info.uname = owner
                archive.addfile(info, io.BytesIO())
        if member == "caf\xe9.png":
            with pytest.raises(BadTar, match=r"the name of member b'caf\\xe9.png' is not UTF-8.*convmv"):
                index_tar(tmp_path / "x.tar")
        else:
            assert index_tar(tmp_path / "x.tar").samples[-1].key == "z"


def test_volume_labels_and_global_headers_are_passed_over(tmp_path: Path) -> None:
    label = tarfile.TarInfo("set 1")
    label.type = b"V"
    path = write_members(tmp_path / "x.tar", label, ("a.png", b"one"))
    assert index_tar(path).ignored == {"volume labels": 1}
    assert list(stream_images(index_tar(path))) == [(0, "a", b"one")]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0" * 40}) as archive:
        archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    assert list(stream_images(index_tar(path))) == [(0, "a", b"")]


def test_fingerprint_survives_a_copy_and_changes_with_repacking(
    tmp_path: Path, pack: Pack, samples: MakeSamples
) -> None:
    first = index_tar(pack(tmp_path / "x.tar", samples(5, 0)))
    copy = shutil.copy(first.location, tmp_path / "moved.tar")
    assert index_tar(copy).fingerprint == first.fingerprint
    rows = samples(5, 0)
    later = pack(tmp_path / "t.tar", rows, mtime=1_800_000_000)
    swapped = pack(tmp_path / "s.tar", [rows[1], rows[0], *rows[2:]])
    shorter = pack(tmp_path / "n.tar", rows[:4])
    prints = {index_tar(path).fingerprint for path in (later, swapped, shorter)} | {first.fingerprint}
    assert len(prints) == 4


def test_a_tar_that_changes_after_indexing_is_refused(
    tmp_path: Path, tar: Path, pack: Pack, samples: MakeSamples
) -> None:
    index = index_tar(tar)
    rows = samples(9, 4)
    for changed in (
        [rows[1], rows[0], *rows[2:]],
        rows[:8],
        [*rows, *samples(1, 7)],
        [(rows[0][0], rows[3][1]), *rows[1:]],
    ):
        pack(tar, changed)
        with pytest.raises(BadTar, match="has changed since it was indexed"):
            list(stream_images(index))
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(BadTar, match=r"ends early|has changed"):
        list(stream_images(index))
    with pytest.raises(BadTar, match="has changed since it was indexed"):
        read_member(index, 8, "png")


def test_index_is_picklable(tar: Path) -> None:
    index = index_tar(tar)
    again = pickle.loads(pickle.dumps(index))
    assert list(again.samples) == list(index.samples)


def test_key_hash_is_xxh3_64() -> None:
    assert key_hash("part/0001") == xxhash.xxh3_64(b"part/0001").intdigest()


def test_expand(tmp_path: Path) -> None:
    for name in ("a/00.tar", "a/01.tar", "b/02.tar", "b/03.tar", "b/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)
    assert [p.rpartition("/")[2] for p in expand([f"{root}/b/*.tar", f"{root}/a/{{00..01}}.tar"])] == [
        "02.tar",
        "03.tar",
        "00.tar",
        "01.tar",
    ]
    assert [p[-6:] for p in expand([f"{root}/**/*.tar"])] == ["00.tar", "01.tar", "02.tar", "03.tar"]
    assert expand([f"{root}/a/00.tar"]) == expand([f"file://{root}/a/00.tar"]) == [f"{root}/a/00.tar"]
    for patterns, message in (
        ([f"{root}/a/*.tar", f"{root}/c/*.tar"], r"/c/\*\.tar' matches no file"),
        ([f"{root}/a/{{00..02}}.tar"], r"a/02\.tar' \(from .* matches no file"),
        ([f"{root}/a"], "matches no file"),
        ([f"{root}/a/0*.tar", f"{root}/a/00.tar"], "name it once"),
        ([f"{root}/a/{{00.tar"], "matches no file|nbalanced"),
        (["pipe:cat x.tar"], "is a command"),
        (["memory://none/*.tar"], "matches no file"),
        ([], "no tars given"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(patterns)
