"""One reader of captions: training, tokenizer and evaluation see the same ones."""

import io
import math
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import picture, write_tar
from tests.trainer.loading import load_batches
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS, CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import Annotation, read_annotation
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.dataset import load_dataset_config, open_dataset
from threetowers.eval.datasets.image_set import read_images
from threetowers.eval.tasks.settings import RetrievalSettings
from threetowers.trainer.config import parse
from threetowers.trainer.data.loader import TrainingSampleReader
from threetowers.trainer.data.run_samples import open_samples

LINES = ("a red disc", "one disc, in red", "", "a disc of red paint", "red: disc")
AS_ONE = ("\n".join(LINES),)
BY_LINE = tuple(line for line in LINES if line)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A tar of 12 samples whose text has five lines, one of them empty."""
    members = {"png": picture("red", "disc", 0), "txt": "\n".join(LINES).encode() + b"\n"}
    return write_tar(tmp_path / "lines.tar", [(f"s{number:02d}", members) for number in range(12)])


@pytest.mark.parametrize(("per_line", "expected"), [(False, AS_ONE), (True, BY_LINE)])
def test_training_tokenizer_and_evaluation_see_the_same_captions(
    tar: Path,
    clip: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    per_line: bool,
    expected: tuple[str, ...],
) -> None:
    from threetowers.trainer import cli, tokenizer

    index = index_tar(tar)
    captions = CaptionFormat(caption_per_line=per_line)
    assert read_annotation(index, 0, captions=captions).captions == expected

    # Training draws one caption of each sample in each epoch.
    data = clip["data"] | {"tars": [str(tar)], "caption_per_line": per_line, "group_field": None}
    run = parse(clip | {"data": data})
    reader = TrainingSampleReader(run, open_samples(run, tmp_path))
    trained_on = set()
    for epoch in range(8):
        for sample in range(12):
            trained_on.update(reader.read(epoch, sample).captions or ())
    assert trained_on == set(expected)

    # The tokenizer counts each distinct caption once.
    corpora: list[list[str]] = []
    train_tokenizer = tokenizer.train_tokenizer

    def record(captions: list[str], *args: Any) -> bytes:
        corpora.append(list(captions))
        return train_tokenizer(captions, *args)

    monkeypatch.setattr(tokenizer, "train_tokenizer", record)
    cli.train_tokenizer((str(tar),), tmp_path / "tokenizer.model", vocab_size=24, caption_per_line=per_line)
    assert corpora == [list(expected)]

    # Evaluation, of tars and of a described data set
    assert {image.captions for image in read_images([index], captions).images} == {expected}
    description = {"name": "lines", "tars": ["lines.tar"], "caption_per_line": per_line, "tasks": {"retrieval": {}}}
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump(description))
    opened = open_dataset(load_dataset_config(tmp_path / "lines.yaml"), "retrieval", RetrievalSettings())
    assert {image.captions for image in opened.test.images()} == {expected}


def test_a_clip_benchmark_folder_has_a_caption_a_line(tar: Path, tmp_path: Path) -> None:
    split = tmp_path / "flickr" / "test"
    split.mkdir(parents=True)
    tar.rename(split / "0.tar")
    (split / "nshards.txt").write_text("1\n")
    (tmp_path / "flickr" / "dataset_type.txt").write_text("retrieval\n")
    opened = open_dataset(load_dataset_config(tmp_path / "flickr"), "retrieval", RetrievalSettings())
    assert {image.captions for image in opened.test.images()} == {BY_LINE}


def annotated(path: Path, **members: bytes) -> Path:
    """A tar of one sample with these members beside an image."""
    return write_tar(path, [("s", {"png": picture("red", "disc", 0)} | members)])


def read(tmp_path: Path, captions: CaptionFormat = DEFAULT_CAPTIONS, **members: bytes) -> Annotation:
    """The annotation of a sample with these members, by the names of their extensions with _ for a dot."""
    named = {name.replace("_", "."): data for name, data in members.items()}
    return read_annotation(index_tar(annotated(tmp_path / "x.tar", **named)), 0, captions=captions)


def test_txt_goes_before_json_and_cls_is_a_field(tmp_path: Path) -> None:
    annotation = read(tmp_path, txt=b" from txt\n", json=b'{"caption": "from json", "n": 3}', cls=b"4, 7\n")
    assert annotation.captions_by_source == {"txt": ("from txt",)}
    assert annotation.fields == {"caption": "from json", "n": 3, "cls": [4, 7]}
    assert annotation.notes == ()


def test_a_missing_caption_is_an_error_only_where_one_is_required(tmp_path: Path) -> None:
    index = index_tar(annotated(tmp_path / "x.tar", cls=b"4"))
    with pytest.raises(BadSample, match=r"x\.tar: sample 's': no caption; .*found members \['cls', 'png'\]") as raised:
        read_annotation(index, 0)
    assert raised.value.reason == "no caption"
    annotation = read_annotation(index, 0, captions_required=False)
    assert (annotation.captions, annotation.fields) == ((), {"cls": [4]})


@pytest.mark.parametrize(
    ("members", "captions", "notes"),
    [
        # A good text beside a bad object, and the other way round
        ({"txt": b"good", "json": b'{"caption": null}'}, ("good",), ("json.caption: null",)),
        ({"txt": b"good", "json": b'{"caption": "  "}'}, ("good",), ("json.caption: empty",)),
        ({"txt": b"good", "json": b'{"captions": []}'}, ("good",), ("json.captions: empty",)),
        ({"txt": b"good", "json": b'{"captions": {"en": "x"}}'}, ("good",), ("json.captions: not text",)),
        ({"txt": b"good", "json": b'[{"caption": "x"}]'}, ("good",), ("json: not an object",)),
        ({"txt": b"good", "json": b'{"caption": "cut'}, ("good",), ("json: not JSON",)),
        ({"txt": b"good", "json": b"[" * 100_000}, ("good",), ("json: not JSON",)),
        ({"txt": b"good", "json": b""}, ("good",), ("json: not JSON",)),
        ({"txt": b"good", "json": b"\xff"}, ("good",), ("json: neither UTF-8 nor UTF-16",)),
        ({"txt": b" \n", "json": b'{"caption": "good"}'}, ("good",), ("txt: empty",)),
        ({"txt": b"the cat\x92s hat", "json": b'{"caption": "good"}'}, ("good",), ("txt: neither UTF-8 nor UTF-16",)),
        ({"txt": b"a \0 b", "json": b'{"caption": "good"}'}, ("good",), ("txt: NUL characters",)),
        ({"txt": "x".encode("utf-16-le"), "json": b'{"caption": "good"}'}, ("good",), ("txt: NUL characters",)),
        # Some of several captions
        ({"json": b'{"captions": ["x", null, 3, "", "y"]}'}, ("x", "y"), ("null", "not text", "empty")),
        ({"json": rb'{"captions": ["x", "\ud800", "a\u0000b"]}'}, ("x",), ("not Unicode", "NUL characters")),
        ({"json": b'{"captions": null, "caption": "good"}'}, ("good",), ("json.captions: null",)),
        # Marks of the encoding
        ({"txt": b"\xef\xbb\xbfcaf\xc3\xa9"}, ("café",), ()),
        ({"txt": "café".encode("utf-16")}, ("café",), ()),
        ({"txt": b"\xfe\xff" + "café".encode("utf-16-be")}, ("café",), ()),
        ({"json": b'\xef\xbb\xbf{"caption": "good"}'}, ("good",), ()),
        # Members that are no captions
        ({"txt": b"good", "cls": b"cat"}, ("good",), ("cls: not numbers",)),
    ],
)
def test_what_can_be_used_is_used_and_the_rest_is_noted(
    tmp_path: Path, members: dict[str, bytes], captions: tuple[str, ...], notes: tuple[str, ...]
) -> None:
    annotation = read(tmp_path, **members)
    assert annotation.captions == captions
    full = [note if ": " in note else f"json.captions: {note}" for note in notes]
    assert list(annotation.notes) == full


def test_a_sample_without_a_usable_caption_tells_why(tmp_path: Path) -> None:
    index = index_tar(annotated(tmp_path / "x.tar", txt=b"\xff", json=b'{"caption": null, "kind": "cat"}'))
    reason = "no caption (txt: neither UTF-8 nor UTF-16, json.caption: null)"
    with pytest.raises(BadSample, match=re.escape(f"x.tar: sample 's': {reason}; found members")) as raised:
        read_annotation(index, 0)
    assert raised.value.reason == reason
    # Where labels count and captions do not, the sample is good.
    assert read_annotation(index, 0, captions_required=False).fields["kind"] == "cat"
    assert [image.fields["kind"] for image in read_images([index]).images] == ["cat"]


def test_named_sources_are_read_alone_and_in_their_order(tmp_path: Path) -> None:
    members = {"txt": b"old", "cap": b"one\ntwo", "json": b'{"TEXT": ["three"], "a.b": "four", "caption": null}'}
    named = CaptionFormat({"json.TEXT": 1, "cap": 2, "json.a.b": 1, "outputs.txt": 1}, caption_per_line=True)
    annotation = read(tmp_path, named, **members)
    assert annotation.captions_by_source == {"json.TEXT": ("three",), "cap": ("one", "two"), "json.a.b": ("four",)}
    assert annotation.notes == ()  # nobody asked for json.caption
    with pytest.raises(
        BadSample,
        match=r"no caption; found members \['cap', 'json', 'png', 'txt'\], json fields \['TEXT', 'a\.b', 'caption'\], "
        r"expected a caption in outputs\.txt \(captions, --captions,",
    ):
        read(tmp_path, CaptionFormat({"outputs.txt": 1}), **members)
    assert read(tmp_path, CaptionFormat({"outputs.txt": 1}), outputs_txt=b"five").captions == ("five",)


def test_captions_are_in_other_json_members_too(tmp_path: Path) -> None:
    """A field of KEY.syn.json, whose object is apart from that of KEY.json."""
    captions = CaptionFormat({"syn.json.syn_text": 1, "json.syn_text": 1, "txt": 1})
    both = {"syn_json": b'{"syn_text": ["one", " two "]}', "json": b'{"syn_text": "three"}', "txt": b"four"}
    found = read(tmp_path, captions, **both)
    assert found.captions_by_source == {
        "syn.json.syn_text": ("one", "two"),
        "json.syn_text": ("three",),
        "txt": ("four",),
    }
    assert found.fields == {"syn_text": "three"}
    assert read(tmp_path, captions, txt=b"four").captions == ("four",)
    for data, fault in ((b"[1]", "not an object"), (b"{", "not JSON"), (b'{"syn_text": null}', "null")):
        annotation = read(tmp_path, captions, syn_json=data, txt=b"four")
        assert (annotation.captions, annotation.notes) == (("four",), (f"syn.json.syn_text: {fault}",))


def test_a_caption_is_drawn_by_weight_among_the_sources_that_have_one() -> None:
    captions = CaptionFormat({"txt": 1, "json.caption": 2, "cap": 1})
    found = {"txt": ("a", "b"), "json.caption": ("c",)}
    drawn = Counter(captions.draw(found, np.random.default_rng(seed)) for seed in range(3000))
    assert drawn.keys() == {"a", "b", "c"}
    assert abs(drawn["c"] - 2000) < 4 * math.sqrt(3000 * 2 / 9)  # four deviations of a binomial
    assert abs(drawn["a"] - drawn["b"]) < 4 * math.sqrt(1000)
    # The order in which a config names them does not matter.
    other = CaptionFormat({"cap": 1, "json.caption": 2, "txt": 1})
    backwards = dict(reversed(found.items()))
    for seed in range(50):
        rng = np.random.default_rng(seed)
        assert other.draw(backwards, rng) == captions.draw(found, np.random.default_rng(seed))
    # A single source takes one random number, as ever.
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    assert captions.draw({"txt": ("a", "b", "c")}, rng) == "abc"[same.integers(3)]
    assert rng.random() == same.random()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["jpg"], "found 'jpg', expected the extension of a text member"),
        ([".txt"], "found '.txt', expected the extension"),
        (["json."], "expected the extension"),
        (["syn.json."], "expected the extension"),
        (["Syn.json.Text"], "found 'Syn.json.Text', expected 'syn.json.Text'"),
        (["TXT"], "found 'TXT', expected 'txt'"),
        (["txt=0"], "weight 0.0 of 'txt', expected a positive number"),
        (["txt=nan"], "expected a positive number"),
        (["txt=much"], "found 'txt=much', expected SOURCE or SOURCE=WEIGHT"),
        (["txt", "txt=2"], "found 'txt' twice"),
    ],
)
def test_what_is_no_source_is_refused(items: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"--captions: .*{message}"):
        CaptionFormat.parse(items)


def test_sources_are_parsed_with_their_weights() -> None:
    parsed = CaptionFormat.parse(["txt", "json.caption=2.5", "outputs.txt=1"], caption_per_line=True)
    assert parsed == CaptionFormat({"txt": 1, "json.caption": 2.5, "outputs.txt": 1}, True)
    assert CaptionFormat.parse([]) == DEFAULT_CAPTIONS


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_named_sources_reach_the_trainer(
    clip: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    """A member of any extension is read by random access and in a stream."""
    members = {"png": picture("red", "disc", 0), "txt": b"old", "outputs.txt": b"new", "json": b'{"long": "longer"}'}
    tar = write_tar(tmp_path / "recaptioned.tar", [(f"s{number:02d}", members) for number in range(12)])
    datasets = {
        "all": {"tars": [str(tar)], "captions": {"outputs.txt": 1, "json.long": 1}},
        "old": {"tars": [str(write_tar(tmp_path / "old.tar", [("a/" + str(n), members) for n in range(12)]))]},
    }
    streams = {"access": access, "num_streams": 1, "group_field": None}
    clip["data"] = (
        {key: value for key, value in clip["data"].items() if key != "tars"} | {"datasets": datasets} | streams
    )
    clip["data"]["captions"] = {"txt": 1}
    encoded: list[str] = []
    encode = SentencePieceTokenizer.encode

    def spied(self: SentencePieceTokenizer, captions: list[str], length: int, padding: Any) -> Any:
        encoded.extend(captions)
        return encode(self, captions, length)

    monkeypatch.setattr(SentencePieceTokenizer, "encode", spied)
    load_batches(clip, stop=4)
    counts = Counter(encoded)
    assert counts.keys() == {"new", "longer", "old"}
    assert counts["old"] == 24


def test_a_tar_that_has_become_shorter_is_no_bad_sample(tmp_path: Path) -> None:
    """`on_bad: skip` must not pass over a tar that has changed."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("s.png", b"image"), ("s.txt", b"caption")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    index = index_tar(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(BadTar, match="has changed since it was indexed"):
        read_annotation(index, 0)
