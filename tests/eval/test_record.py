"""Records: round trip, identity, refusal of what is damaged."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from threetowers.eval.record import BadRecord, EvalRecord, EvalSpec, TarRef, digest, read_record, write_record


def spec(**changes: Any) -> EvalSpec:
    base = EvalSpec(
        task="retrieval",
        data="noto v1/ß",
        model="3t",
        model_digest="ab12",
        step=1200,
        tars=(TarRef("test-00000.tar", "9f86", 77), TarRef("test-00001.tar", "d081", 5)),
        preprocessing="centre crop 64",
        precision="float32",
        cache_manifest="c0ffee",
        settings={"group": "concept", "captions": 5, "third": True, "margin": 0.5, "part": None},
    )
    return dataclasses.replace(base, **changes)


def record(**changes: Any) -> EvalRecord:
    base = EvalRecord(
        spec=spec(),
        metrics={"image_to_text/recall@1": 1 / 3, "image_to_text/median_rank": 2.5},
        counts={"images": 77},
        sample_ids=digest(["a", "b"]),
        texts=digest(["x"]),
        seconds=0.25,
    )
    return dataclasses.replace(base, **changes)


def test_round_trip(tmp_path: Path) -> None:
    written = record()
    path = write_record(written, tmp_path / "results")
    assert read_record(path) == written
    assert [p.name for p in path.parent.iterdir()] == [written.file_name]
    assert path.name.isascii()
    assert "torch" in written.versions


@pytest.mark.parametrize(
    "change",
    [
        {"data": "noto"},
        {"step": 1201},
        {"model_digest": "ab13"},
        {"precision": "bfloat16"},
        {"cache_manifest": None},
        {"model_fingerprint": "another architecture"},
        {"settings": {"group": "concept", "captions": 4}},
        {"tars": (TarRef("test-00000.tar", "9f86", 77),)},
    ],
)
def test_any_change_of_the_question_is_another_spec(change: dict[str, Any]) -> None:
    assert spec(**change).fingerprint() != spec().fingerprint()


def test_fingerprint_does_not_depend_on_process_or_order_of_settings() -> None:
    settings = dict(reversed(spec().settings.items()))
    assert spec(settings=settings).fingerprint() == spec().fingerprint()
    code = (
        "from threetowers.eval.record import EvalSpec; "
        "print(EvalSpec('t', 'g', 'r', 'm', 1, (), 'p', 'f', None, {'b': 1, 'a': None}).fingerprint())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == EvalSpec("t", "g", "r", "m", 1, (), "p", "f", None, {"a": None, "b": 1}).fingerprint()


def test_digest_ignores_order_but_nothing_else() -> None:
    assert digest(["b", "a"]) == digest(iter(["a", "b"]))
    assert len({digest(s) for s in (["ab"], ["a", "b"], ["a", "b", "b"], [], [""], ["\ud800"])}) == 6


def test_nonfinite_metric_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match=r"retrieval on 'noto v1/ß' gave \{'loss': nan\}"):
        write_record(record(metrics={"loss": math.nan}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = record()
    path = write_record(old, tmp_path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_record(record(seconds=99.0), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert read_record(path) == old


def test_damaged_records_are_refused_by_file_and_field(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    content = json.loads(path.read_text())

    def refused(text: str, match: str) -> None:
        path.write_text(text)
        with pytest.raises(BadRecord, match=match) as failure:
            read_record(path)
        assert str(path) in str(failure.value)

    refused(json.dumps(content)[:-20], "cannot be read as JSON")
    refused("[1]", "record format None")
    refused(json.dumps(content | {"format": 99}), "record format 99, this version reads 4")
    refused(json.dumps(content | {"spec": content["spec"] | {"step": "many"}}), "spec.step: Input should be")
    del content["counts"]
    refused(json.dumps(content), "counts: ")
    with pytest.raises(BadRecord, match=r"missing\.json"):
        read_record(tmp_path / "missing.json")
