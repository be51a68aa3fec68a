"""What cannot be used: counted by reason, shown beside every number, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import COLOURS, samples_of, write_tar
from tests.eval.runs import finished
from threetowers.cache.webdataset.sample import BadSample
from threetowers.eval.cli import EvalFlags, search, suite
from threetowers.eval.compare import compare
from threetowers.eval.datasets.dataset_config import DatasetError
from threetowers.eval.datasets.image_set import ImageReader
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.left_out import is_complete, left_out_share, left_out_text
from threetowers.eval.suite import evaluate
from threetowers.eval.terminal import suite_text

CONFIG: dict[str, Any] = {
    "name": "colours",
    "tars": ["test.tar"],
    "train": {"tars": ["train.tar"]},
    "label": "colour",
    "prompts": ["a {c} thing"],
    "shifted": {"again": {"tars": ["train.tar"]}},
    "outliers": {"same": {"tars": ["train.tar"]}},
    "tasks": {
        "retrieval": {},
        "zeroshot": {},
        "fewshot": {"shots": [1], "seeds": [0]},
        "probe": {"penalties": [1.0]},
        "knn": {"ks": [1]},
        "shift": {},
        "ood": {"k": 2},
    },
}


def coloured(start: int, count: int, bad: int) -> list[tuple[str, dict[str, bytes]]]:
    """Samples with a colour as their label, the first of which cannot be decoded."""
    samples = samples_of(start, count)
    for number, (_, members) in enumerate(samples):
        fields = json.loads(members["json"])
        members["json"] = json.dumps(fields | {"colour": fields["captions"][0].split()[1]}).encode()
        if number < bad:
            members["png"] = b"broken"
    return samples


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A data set of 24 images, 9 of which cannot be decoded, one without caption and one without label."""
    samples = coloured(0, 24, 9)
    for number, key in ((20, "captions"), (21, "colour")):
        fields = json.loads(samples[number][1]["json"])
        del fields[key]
        samples[number][1]["json"] = json.dumps(fields).encode()
    write_tar(tmp_path / "test.tar", samples)
    write_tar(tmp_path / "train.tar", coloured(40, 20, 3))
    path = tmp_path / "colours.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_every_form_of_a_result_tells_what_was_left_out(clip: dict[str, Any], broken: Path, tmp_path: Path) -> None:
    result = evaluate([finished(clip)], [broken], tmp_path / "out", options=LoadOptions(workers=0))
    found = {record.spec.task: record for record in result.records}
    assert list(found) == list(CONFIG["tasks"])
    assert result.exit_code == 0
    parts = {"fewshot": "train", "probe": "train", "knn": "train", "shift": "again", "ood": "train"}
    for task, record in found.items():
        own = {"no caption": 1} if task == "retrieval" else {"no label": 1}
        expected = {"undecodable": 9, **own}
        if task in parts:
            expected[f"{parts[task]}/undecodable"] = 3
        if task == "ood":
            expected["same/undecodable"] = 3
        assert record.left_out == expected
        images = record.counts.get("images", record.counts.get("original/images"))
        assert images == 14  # the images in are those used and those left out

    page, markdown, terminal = (
        result.report.html.read_text(),
        result.report.markdown.read_text(),
        suite_text(result),
    )
    for text in (page, markdown, terminal):
        assert "retrieval: 10 of 24 images: 9 undecodable, 1 no caption" in text
        assert "knn: 10 of 24 images: 9 undecodable, 1 no label; train: 3 undecodable" in text
    rows = [line for line in terminal.splitlines() if line.startswith("colours  ")]
    assert len(rows) > 7
    assert all(line.endswith("10 of 24") for line in rows)
    others = markdown.partition("## Other results")[2].partition("\n## ")[0]
    numbers = [line for line in others.splitlines() if re.match(r"\| (knn|zeroshot|fewshot|probe|shift|ood) \|", line)]
    assert len(numbers) > 20
    assert all(line.endswith("| 10 of 24 |") for line in numbers)
    again = compare([tmp_path / "out"], tmp_path / "elsewhere").markdown.read_text()
    assert "retrieval: 10 of 24 images: 9 undecodable, 1 no caption" in again


def test_galleries_of_one_set_count_their_images_once(clip: dict[str, Any], broken: Path, tmp_path: Path) -> None:
    tree = CONFIG | {"tasks": {"retrieval": {"gallery_field": "colour"}}, "name": "g"}
    broken.write_text(yaml.safe_dump(tree))
    result = evaluate([finished(clip)], [broken], tmp_path / "out", options=LoadOptions(workers=0))
    assert [record.spec.data for record in result.records] == [f"g/{colour}" for colour in sorted(COLOURS)]
    row = next(line for line in result.report.markdown.read_text().splitlines() if line.startswith("| clip |"))
    assert row.endswith("| 11 of 24 |")


def test_nothing_left_out_is_said_too(clip: dict[str, Any], tars: list[Path], tmp_path: Path) -> None:
    config = tmp_path / "all.yaml"
    config.write_text(yaml.safe_dump({"name": "all", "tars": [str(tars[0])], "tasks": {"retrieval": {}}}))
    result = evaluate([finished(clip)], [config], tmp_path / "out", options=LoadOptions(workers=0))
    assert "left out: nothing" in suite_text(result)
    assert result.records[0].left_out == {}


def test_search_tells_what_it_did_not_search(
    clip: dict[str, Any], broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(finished(clip))
    tars = (str(tmp_path / "test.tar"),)
    search(model, tars, ("a red disc",), tmp_path / "out", workers=0)
    last = capsys.readouterr().out.splitlines()[-2]
    assert last == "clip, exact search of 15 images; left out: 9 of 24 images: 9 undecodable"
    assert "Left out: 9 of 24 images: 9 undecodable" in (tmp_path / "out/search.html").read_text()
    with pytest.raises(BadSample, match=r"test\.tar: sample 's0000': .*set on_bad: skip"):
        search(model, tars, ("a red disc",), on_bad="error", workers=0)


def test_what_cannot_be_read_is_refused_where_asked(clip: dict[str, Any], broken: Path, tmp_path: Path) -> None:
    flags = EvalFlags((str(finished(clip)),), tmp_path / "out", workers=0, on_bad="error")
    with pytest.raises(DatasetError, match=r"sample 's0000': .*set on_bad: skip to leave such samples out"):
        suite(flags, (str(broken),))
    samples = coloured(0, 4, 0)
    samples[2][1]["json"] = b'{"colour": "red"}'
    write_tar(tmp_path / "test.tar", samples)
    with pytest.raises(DatasetError, match=r"sample 's0002': no caption; .*set on_bad: skip"):
        suite(flags, (str(broken),), ("retrieval",))


def test_bad_tars_are_named_together_or_left_out(
    clip: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", samples_of(0, 8))
    whole = (tmp_path / "a.tar").read_bytes()
    for name in ("b", "c"):
        (tmp_path / f"{name}.tar").write_bytes(whole[: len(whole) // 2])
    patterns = [str(tmp_path / "?.tar")]
    with pytest.raises(ValueError, match=r"(?s)2 of 3 tars cannot be used: .*b\.tar: truncated.*c\.tar: tr.*skip_tars"):
        ImageReader().read(patterns)
    write_tar(tmp_path / "d.tar", [])
    with caplog.at_level("INFO"):
        data = ImageReader().read(patterns, on_bad="skip_tars")
    assert f"1 tars hold no samples: {tmp_path / 'd.tar'}" in caplog.messages
    assert (len(data.images), dict(data.left_out)) == (8, {"bad tars": 2})
    config = {"name": "some", "tars": patterns, "on_bad": "skip_tars", "tasks": {"retrieval": {}}}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(config))
    result = evaluate([finished(clip)], [tmp_path / "some.yaml"], tmp_path / "out", options=LoadOptions(workers=0))
    assert "left out of some, retrieval: 2 bad tars" in suite_text(result)


def test_wording() -> None:
    left_out = {"unreadable": 38, "no caption": 2, "train/unreadable": 3, "bad tars": 1, "no label": 0}
    assert left_out_share(24, left_out) == "40 of 64"
    assert (
        left_out_text(24, left_out) == "40 of 64 images: 38 unreadable, 2 no caption, 1 bad tars; train: 3 unreadable"
    )
    selected = {"outside the filter": 9, "train/outside the subset": 2}
    assert left_out_share(24, selected) == "0"
    assert left_out_text(24, selected) == (
        "nothing; not selected: 9 outside the filter; not selected of train: 2 outside the subset"
    )
    assert is_complete(selected)
    assert not is_complete({**selected, "train/unreadable": 1})
    assert (left_out_share(3, {}), left_out_text(3, {"unreadable": 0})) == ("0", "nothing")
