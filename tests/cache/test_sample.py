"""One reader of captions: training, tokenizer and evaluation see the same ones."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import picture, write_tar
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import read_annotation
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
    assert read_annotation(index, 0, caption_per_line=per_line).captions == expected

    # Training draws one caption of each sample in each epoch.
    data = clip["data"] | {"tars": [str(tar)], "caption_per_line": per_line, "group_field": None}
    run = parse(clip | {"data": data})
    reader = TrainingSampleReader(run, open_samples(run, tmp_path))
    trained_on = set()
    for epoch in range(8):
        for sample in range(12):
            trained_on.add(reader.read(epoch, sample).caption)
    assert trained_on == set(expected)

    # The tokenizer counts each distinct caption once.
    corpora: list[list[str]] = []
    train_tokenizer = tokenizer.train_tokenizer

    def record(captions: list[str], vocab_size: int) -> bytes:
        corpora.append(list(captions))
        return train_tokenizer(captions, vocab_size)

    monkeypatch.setattr(tokenizer, "train_tokenizer", record)
    cli.train_tokenizer((str(tar),), tmp_path / "tokenizer.model", vocab_size=24, caption_per_line=per_line)
    assert corpora == [list(expected)]

    # Evaluation, of tars and of a described data set
    assert {image.captions for image in read_images([index], per_line).images} == {expected}
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


def test_json_goes_before_txt_and_cls_is_a_field(tmp_path: Path) -> None:
    tar = annotated(tmp_path / "x.tar", txt=b"from txt", json=b'{"caption": " from json ", "n": 3}', cls=b"4, 7\n")
    annotation = read_annotation(index_tar(tar), 0)
    assert annotation.captions == ("from json",)
    assert annotation.fields == {"caption": " from json ", "n": 3, "cls": [4, 7]}


def test_a_missing_caption_is_an_error_only_where_one_is_required(tmp_path: Path) -> None:
    index = index_tar(annotated(tmp_path / "x.tar", cls=b"4"))
    with pytest.raises(BadSample, match=r"x\.tar: sample 's': no caption; .*found members \['cls', 'png'\]"):
        read_annotation(index, 0)
    annotation = read_annotation(index, 0, captions_required=False)
    assert (annotation.captions, annotation.fields) == ((), {"cls": [4]})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": b"\xff"}, "codec can't decode"),
        ({"json": b"[1]"}, "holds a list, expected an object"),
        ({"json": b"{"}, "Expecting property name"),
        ({"json": b'{"captions": [1]}'}, r"captions are \[1\], expected a list of strings"),
        ({"txt": b"a", "cls": b"cat"}, "invalid literal for int"),
    ],
)
def test_members_that_are_not_what_their_names_say_make_a_bad_sample(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(BadSample, match=f"x.tar: sample 's': .*{message}"):
        read_annotation(index_tar(annotated(tmp_path / "x.tar", **members)), 0, captions_required=False)


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
