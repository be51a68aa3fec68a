"""The look at the annotations before the first step: what it says, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import picture, samples_of, write_tar
from tests.trainer.loading import load_batches, open_run
from threetowers.cache.webdataset import sample
from threetowers.cache.webdataset.defects import BadSample
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data import annotation_survey
from threetowers.trainer.data.annotation_survey import survey_annotations


def survey(tree: dict[str, Any]) -> list[str]:
    return survey_annotations(parse(tree), open_run(tree))


def with_samples(clip: dict[str, Any], folder: Path, texts: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    """The run on a tar of samples with these members: texts as they are, others as JSON."""
    members = []
    for number, one in enumerate(texts):
        encoded = {name: (v.encode() if isinstance(v, str) else json.dumps(v).encode()) for name, v in one.items()}
        members.append((f"s{number:04d}", {"png": picture("red", "disc", number)} | encoded))
    tar = write_tar(folder / "survey.tar", members)
    return clip | {"data": clip["data"] | {"tars": [str(tar)], "group_field": None} | data}


def test_the_source_of_the_captions_is_told(clip: dict[str, Any], tmp_path: Path) -> None:
    texts = [{"txt": "new", "json": {"caption": "old"}}] * 10 + [{"txt": "same\nagain", "json": {"caption": None}}] * 3
    texts += [{"json": {"caption": "alone"}}] * 7
    tree = with_samples(clip, tmp_path, texts)
    assert survey(tree) == [
        "captions: from txt in 13, from json.caption in 7 of 20 samples looked at",
        "captions: 3 of 20 samples looked at have a caption of several lines; if each line is one, set "
        "data.caption_per_line: true",
        "captions: 10 of 20 samples looked at have other captions in another source; data.captions chooses",
        "noted: json.caption: null, in 3 of 20 samples looked at",
    ]
    tree["data"] |= {"captions": {"json.caption": 1, "txt": 0.5}, "caption_per_line": True}
    assert survey(tree)[0] == (
        "captions: from json.caption (weight 1) in 17, from txt (weight 0.5) in 13 of 20 samples looked at; each line "
        "of a text member is one"
    )


def test_a_source_of_captions_that_no_sample_has_is_refused(clip: dict[str, Any], tmp_path: Path) -> None:
    tree = with_samples(clip, tmp_path, [{"txt": "a", "json": {"caption": "b"}}] * 12)
    tree["data"] |= {"captions": {"txt": 1, "json.captoin": 2}}
    with pytest.raises(ConfigError, match=r"none of 12 samples looked at has a caption in json\.captoin") as error:
        survey(tree)
    assert "found captions in ['txt'], and the JSON fields ['caption']" in str(error.value)


def test_a_bounded_number_of_samples_is_looked_at(
    clip: dict[str, Any], tars: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_survey, "LOOKED_AT", 10)
    looked_at: list[tuple[str, int]] = []

    def spied(tar: Any, ordinal: int, **options: Any) -> sample.Annotation:
        looked_at.append((tar.name, ordinal))
        return sample.read_annotation(tar, ordinal, **options)

    monkeypatch.setattr(annotation_survey, "read_annotation", spied)
    (captions, groups) = survey(clip)
    assert captions == "captions: from json.captions in 10 of 10 samples looked at"
    assert groups == (
        "groups by 'concept': 8 in 10 samples looked at; 0 of these have no value and are groups of their own"
    )
    assert len(set(looked_at)) == 10
    assert {("a.tar", 0), ("b.tar", 19)} <= set(looked_at)


def test_samples_without_a_group_are_their_own_and_told(clip: dict[str, Any], tmp_path: Path) -> None:
    values = ["boat", "boat", None, "", float("nan"), 1, 1.0]
    texts = [{"json": {"caption": "a", "kind": value}} for value in values] + [{"txt": "b"}] * 5
    tree = with_samples(clip, tmp_path, texts, group_field="kind")
    line = "groups by 'kind': 10 in 12 samples looked at; 8 of these have no value and are groups of their own"
    assert line in survey(tree)
    (batch,) = load_batches(tree, stop=1)
    assert len(set(batch.groups_b.tolist())) == 10
    assert batch.notes.count("group_field: no value") == 8
    # A list is no group: such a sample is bad.
    texts[0]["json"]["kind"] = ["boat"]
    (batch,) = load_batches(with_samples(clip, tmp_path, texts, group_field="kind"), stop=1)
    assert len(batch) == 11
    assert "sample 's0000': field 'kind' holds a list, expected a text" in batch.bad[0]


def test_a_bad_sample_that_is_seen_stops_a_strict_run_before_its_first_step(
    clip: dict[str, Any], tmp_path: Path
) -> None:
    tree = with_samples(clip, tmp_path, [{"txt": "a"}] * 9 + [{"txt": ""}] * 2 + [{"txt": "a"}])
    message = r"survey\.tar: sample 's00(09|10)': no caption \(txt: empty\); .*of 12 looked at: 2 no.*on_bad: skip"
    with pytest.raises(BadSample, match=message):
        survey(tree)
    tree["data"]["on_bad"] = "skip"
    assert survey(tree)[-1] == "bad: no caption (txt: empty), 2 of 12 samples looked at"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_field": "kind"}, "data.group_field: all 12 samples looked at are of one group, 'boat', so that"),
        (
            {"group_field": "sort"},
            r"data.group_field: none of 12 samples looked at has a field 'sort' \(found .*'kind'",
        ),
        ({"captions": {"json.TEXT": 1}}, "data: none of 12 samples looked at can be used; check data.captions .*TEXT"),
    ],
)
def test_what_no_sample_has_is_refused_before_the_first_step(
    clip: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tree = with_samples(clip, tmp_path, [{"json": {"caption": "a", "kind": "boat"}}] * 12, **change)
    with pytest.raises(ConfigError, match=message):
        survey(tree)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"kind": "sigmoid"}},
        {"loss": {"mask_false_negatives": False}},
        {"terms": {"image-text": {"x": "f", "y": "g", "kind": "l2"}}},
    ],
)
def test_one_group_is_enough_where_no_negatives_are_needed(
    clip: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    texts = [{"json": {"caption": "a", "kind": "boat"}}] * 12
    assert survey(with_samples(clip, tmp_path, texts, group_field="kind") | change)


def test_a_batch_of_one_is_refused_for_softmax_terms_only(clip: dict[str, Any]) -> None:
    clip["global_batch_size"] = 1
    with pytest.raises(ConfigError, match=r"global_batch_size: found 1, but the terms \['image-text'\]"):
        parse(clip)
    assert parse(clip | {"loss": {"kind": "sigmoid"}}).global_batch_size == 1
    assert parse(clip | {"terms": {"image-text": {"x": "f", "y": "g", "kind": "l2"}}}).global_batch_size == 1


def test_sources_are_checked_with_the_config(clip: dict[str, Any]) -> None:
    clip["data"]["captions"] = {"jpg": 1}
    with pytest.raises(ConfigError, match=re.escape("data.captions: found 'jpg', expected the extension of a text")):
        parse(clip)


def test_notes_are_in_the_log_and_the_summary(clip: dict[str, Any], tmp_path: Path) -> None:
    from threetowers.trainer.engine import leave_process_group
    from threetowers.trainer.train import train

    texts = [{"txt": f"number {number}", "json": {"caption": None}} for number in range(12)]
    tree = with_samples(clip, tmp_path, texts) | {"duration": {"steps": 2}, "log": {"tensorboard": False}}
    tree["data"]["tars"] = [*tree["data"]["tars"], str(write_tar(tmp_path / "more.tar", samples_of(100, 12)))]
    try:
        summary = train(parse(tree))
    finally:
        leave_process_group()
    assert summary.notes == {"json.caption: null": 12}
    lines = (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["notes/json.caption: null"] == 12
